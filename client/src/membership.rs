//! Being present in a session.

use core::time::Duration;

use mainstay_protocol::session::Activity;
use mainstay_protocol::wire::{Join, Label};
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
    generation: u64,
    left: bool,
}

impl Membership {
    pub(crate) async fn join(
        commands: mpsc::Sender<SessionCommand>,
        name: &str,
        grace: Duration,
        doing: Doing,
    ) -> Result<Self, ClientError> {
        let grace = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let request = Join { generation: None, name: Label::new(name)?, grace, activity: doing.0 };
        let (answer, joined) = oneshot::channel();
        let ask = SessionCommand::Ask(Ask::Join { request, answer });
        commands.send(ask).await.map_err(|_| ClientError::Closed)?;
        let generation = joined.await.map_err(|_| ClientError::Closed)??;
        Ok(Self { commands, generation, left: false })
    }

    /// Seq of the record with which it joined, at first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Says what the member is doing now. Nothing is waited for; of many updates the server may leave out all but the last.
    ///
    /// Errors: `Closed`.
    pub async fn update(&self, doing: Doing) -> Result<(), ClientError> {
        self.commands.send(SessionCommand::Update(doing.0)).await.map_err(|_| ClientError::Closed)
    }

    /// Leaves, and waits until everybody can know. Errors: `Refused`, `Closed`.
    pub async fn leave(mut self) -> Result<(), ClientError> {
        let (answer, left) = oneshot::channel();
        self.commands.send(SessionCommand::Ask(Ask::Leave { answer })).await.map_err(|_| ClientError::Closed)?;
        self.left = true;
        left.await.map_err(|_| ClientError::Closed)?.map(drop)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        // Where there is no room its grace ends it.
        let _ = self.commands.try_send(SessionCommand::Ask(Ask::Leave { answer: oneshot::channel().0 }));
    }
}
