//! A session as it is now: the view, kept up to date by folding what comes.

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use mainstay_protocol::session::{Author, Record, Verdict, View};
use mainstay_protocol::wire::Start;

use crate::error::ClientError;
use crate::session::Session;
use crate::subscription::{Event, Subscribing, Subscription};

/// The view of a session, kept up to date. It goes on over reconnects; where records that it has not folded are gone, it
/// starts from a newer view.
///
/// ```no_run
/// # async fn example(session: mainstay_client::Session) -> Result<(), mainstay_client::ClientError> {
/// use mainstay_client::Update;
///
/// let mut live = session.live().await?;
/// while let Some(update) = live.next().await {
///     match update? {
///         Update::Started => println!("{} open messages", live.view().messages().open().len()),
///         Update::Record(folded) => println!("{:?} at {}", folded.record.kind, folded.seq),
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LiveView {
    subscription: Subscription,
    view: View,
    started: bool,
    /// Came with the last delivery and is not folded yet.
    waiting: VecDeque<Folded>,
    /// Where the last delivery ended.
    covered: u64,
    /// A new view is asked for: what was left out is gone, or comes in another form.
    restarting: bool,
    /// It has caught up since it was read last.
    kept_up: bool,
    manner: Manner,
}

/// What happened to a live view.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Update {
    /// The view is there. Comes again when it had to be read anew, and where it is folded, whenever much was left out.
    Started,
    /// One record was folded.
    Record(Folded),
    /// Everything below this tail is folded. Comes once for each time that the view had fallen behind.
    CaughtUp {
        /// The tail.
        tail: u64,
    },
    /// The connection was lost and the view goes on.
    Resumed,
    /// The session is closed and everything is folded. Nothing follows.
    Ended,
}

/// A record that was folded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folded {
    /// Its seq.
    pub seq: u64,
    /// When the server accepted it, in milliseconds since the Unix epoch.
    pub time: u64,
    /// Who wrote it.
    pub author: Arc<Author>,
    /// The record; [`Payload::of`](crate::Payload::of) reads what it says.
    pub record: Record,
}

/// How a view is kept up to date.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Manner {
    pub(crate) window: Option<Duration>,
    pub(crate) folded: bool,
}

impl Manner {
    fn of(self, mut subscribing: Subscribing) -> Subscribing {
        if let Some(window) = self.window {
            subscribing = subscribing.rolled_up(window);
        }
        if self.folded { subscribing.folded() } else { subscribing }
    }
}

impl LiveView {
    /// Of a subscription that starts with the view.
    pub(crate) async fn open(subscribing: Subscribing, manner: Manner) -> Result<Self, ClientError> {
        let subscription = manner.of(subscribing).open().await?;
        Ok(Self {
            subscription,
            view: View::default(),
            started: false,
            waiting: VecDeque::new(),
            covered: 0,
            restarting: false,
            kept_up: true,
            manner,
        })
    }

    /// The view, with everything folded that [`LiveView::next`] told of. Empty before `Started`: see [`LiveView::current`].
    pub fn view(&self) -> &View {
        &self.view
    }

    /// The same, once it is there: waits for the first `Started`, which then does not come. Cancellation-safe.
    ///
    /// Errors: those of [`LiveView::next`], `Closed` if the session ended first.
    pub async fn current(&mut self) -> Result<&View, ClientError> {
        while !self.started {
            self.next().await.ok_or(ClientError::Closed)??;
        }
        Ok(&self.view)
    }

    /// The session.
    pub fn session(&self) -> &Session {
        self.subscription.session()
    }

    /// What happens next; `None` after the last. An error is the last. Cancellation-safe.
    pub async fn next(&mut self) -> Option<Result<Update, ClientError>> {
        loop {
            if let Some(folded) = self.waiting.pop_front() {
                self.view.pass_over(folded.seq);
                return Some(match self.view.fold_record(&folded.author, folded.time, &folded.record) {
                    Ok(()) => Ok(Update::Record(folded)),
                    Err(error) => Err(error.into()),
                });
            }
            self.view.pass_over(self.covered);
            if self.restarting {
                let session = self.subscription.session().clone();
                match self.manner.of(session.subscribe(Start::Snapshot)).open().await {
                    Ok(subscription) => self.subscription = subscription,
                    Err(error) => return Some(Err(error)),
                }
                self.restarting = false;
            }
            let event = match self.subscription.next().await? {
                Ok(event) => event,
                Err(error) => return Some(Err(error)),
            };
            return Some(Ok(match event {
                Event::Started { .. } => continue,
                Event::Snapshot(view) => {
                    self.view = *view;
                    self.started = true;
                    self.covered = self.view.next();
                    Update::Started
                }
                Event::Records(batch) => {
                    if let Err(error) = self.take(&batch) {
                        return Some(Err(error));
                    }
                    continue;
                }
                Event::Gap { .. } => {
                    self.restarting = true;
                    continue;
                }
                // Its texts would be right, its counts not those of others. Of one that is rolled up they are not anyway, and one that
                // cannot keep up is not read anew again and again.
                Event::Compacted => {
                    self.restarting |= self.manner.window.is_none() && core::mem::take(&mut self.kept_up);
                    continue;
                }
                Event::CaughtUp { tail } => {
                    self.kept_up = true;
                    Update::CaughtUp { tail }
                }
                Event::Resumed { verdict, .. } => {
                    self.restarting |= verdict == Verdict::Snapshot && self.manner.window.is_none();
                    Update::Resumed
                }
                Event::Ended => Update::Ended,
            }));
        }
    }

    fn take(&mut self, batch: &crate::RecordBatch) -> Result<(), ClientError> {
        self.covered = batch.next();
        let mut last: Option<Arc<Author>> = None;
        for read in batch.iter() {
            let read = read?;
            let author = match &last {
                Some(author) if **author == *read.author => author.clone(),
                _ => last.insert(Arc::new(read.author.clone())).clone(),
            };
            self.waiting.push_back(Folded { seq: read.seq, time: read.time, author, record: read.record });
        }
        Ok(())
    }
}
