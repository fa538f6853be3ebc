//! Being present in a session.

use core::time::Duration;
use std::sync::{Arc, Weak};

use mainstay_protocol::registry::{MAX_GRACE, MIN_GRACE};
use mainstay_protocol::session::Activity;
use mainstay_protocol::wire::{Join, Label};
use mainstay_transport::entropy;
use tokio::sync::{mpsc, oneshot};

use crate::driver::{Ask, SessionCommand};
use crate::error::ClientError;

/// What a member is doing, to begin with or instead of what it did before.
///
/// ```
/// use mainstay_client::Doing;
///
/// let doing = Doing::new("tool:search")?.progress(40).data(&b"{}"[..]);
/// # Ok::<(), mainstay_client::ClientError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doing(pub(crate) Activity);

impl Doing {
    /// In a word: `idle`, `thinking`, `streaming`, `tool:NAME`, `waiting`, or the application's own. Errors: `NAME_INVALID`.
    pub fn new(status: &str) -> Result<Self, ClientError> {
        Ok(Self(Activity { status: Label::new(status)?, progress: None, data: bytes::Bytes::new() }))
    }

    /// The word.
    pub fn status(&self) -> &str {
        self.0.status.as_str()
    }

    /// How far, in percent; more than 100 counts as 100.
    pub fn progress(mut self, percent: u8) -> Self {
        self.0.progress = Some(u64::from(percent.min(100)));
        self
    }

    /// What else the application wants to say: at most 512 bytes.
    pub fn data(mut self, data: impl Into<bytes::Bytes>) -> Self {
        self.0.data = data.into();
        self
    }
}

/// A member of a session: this client, until it leaves. It stays one while the connection is lost and made again, as long as
/// that takes no longer than its grace; and joins again by itself where it took longer. Dropping it leaves.
#[derive(Debug)]
pub struct Membership {
    commands: mpsc::Sender<SessionCommand>,
    number: u64,
    generation: u64,
    /// The driver looks whether it is still there.
    _held: Arc<()>,
}

/// What the driver knows of a membership that the application asked for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// Which one: another one may have taken it over.
    pub(crate) number: u64,
    pub(crate) request: Join,
    held: Weak<()>,
}

impl Wanted {
    /// True if the application has let it go.
    pub(crate) fn is_dropped(&self) -> bool {
        self.held.strong_count() == 0
    }

    /// How often it shows that it is alive: three of four may be late.
    pub(crate) fn beat(&self) -> Duration {
        Duration::from_millis(self.request.grace / 4)
    }
}

impl Membership {
    pub(crate) async fn join(
        commands: mpsc::Sender<SessionCommand>,
        name: &str,
        grace: Duration,
        doing: Doing,
    ) -> Result<Self, ClientError> {
        let grace = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        if !(MIN_GRACE..=MAX_GRACE).contains(&grace) {
            return Err(ClientError::Invalid("the grace of a member is from one second to two minutes".into()));
        }
        let held = Arc::new(());
        let number = entropy::unique();
        let request = Join { name: Label::new(name)?, grace, activity: doing.0 };
        let wanted = Wanted { number, request, held: Arc::downgrade(&held) };
        let (answer, joined) = oneshot::channel();
        let ask = SessionCommand::Ask(Ask::Join { wanted, answer: Some(answer) });
        commands.send(ask).await.map_err(|_| ClientError::Closed)?;
        let generation = joined.await.map_err(|_| ClientError::Closed)??;
        Ok(Self { commands, number, generation, _held: held })
    }

    /// Seq of the record with which it joined, at first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Says what the member is doing now. No answer is waited for; of many updates the server may leave out all but the last.
    ///
    /// Errors: `Closed`.
    pub async fn update(&self, doing: Doing) -> Result<(), ClientError> {
        let update = SessionCommand::Update { number: self.number, activity: doing.0 };
        self.commands.send(update).await.map_err(|_| ClientError::Closed)
    }

    /// Leaves, and waits until everybody can know. Does nothing if another membership of this session took it over.
    ///
    /// Errors: `Refused`, `Closed`.
    pub async fn leave(self) -> Result<(), ClientError> {
        let (answer, left) = oneshot::channel();
        let ask = Ask::Leave { number: self.number, answer: Some(answer) };
        self.commands.send(SessionCommand::Ask(ask)).await.map_err(|_| ClientError::Closed)?;
        left.await.map_err(|_| ClientError::Closed)?.map(drop)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        // Where there is no room, the driver finds out with its next sign of life.
        let ask = Ask::Leave { number: self.number, answer: None };
        let _ = self.commands.try_send(SessionCommand::Ask(ask));
    }
}
