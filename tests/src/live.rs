//! Sessions and views as tests follow them.

use mainstay_client::{Client, ClientError, Event, LiveView, Record, Session, Start};
use tokio::time::timeout;

use crate::process::PATIENCE;

/// Attaches to a session, which is made if it does not exist.
///
/// # Panics
///
/// If it is refused.
pub async fn attach(client: &Client, name: &str) -> Session {
    client.session(name).expect("a name").create().attach().await.expect("attach")
}

/// The view as it is when it is asked for.
///
/// # Panics
///
/// If it does not come in time.
pub async fn current(live: Result<LiveView, ClientError>) -> LiveView {
    let mut live = live.expect("live");
    timeout(PATIENCE, live.current()).await.expect("in time").expect("the view");
    live
}

/// Folds until `enough`.
///
/// # Panics
///
/// If `what` does not come in time.
pub async fn follow(live: &mut LiveView, what: &str, mut enough: impl FnMut(&LiveView) -> bool) {
    while !enough(live) {
        let update = timeout(PATIENCE, live.next()).await.unwrap_or_else(|_| panic!("{what} does not come"));
        update.expect("an update").expect("no error");
    }
}

/// Every record of a session as it is now.
///
/// # Panics
///
/// If they do not come.
pub async fn records(session: &Session) -> Vec<Record> {
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let mut records = Vec::new();
    loop {
        let event = timeout(PATIENCE, subscription.next()).await.expect("in time");
        match event.expect("an event").expect("no error") {
            Event::Records(batch) => records.extend(batch.iter().map(|record| record.expect("a record").record)),
            Event::CaughtUp { .. } => return records,
            _ => {}
        }
    }
}
