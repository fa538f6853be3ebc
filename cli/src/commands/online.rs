//! `verify --online`: reads what a running server has, and folds it again.

use core::time::Duration;
use std::sync::Arc;

use mainstay_client::{Client, ClientError, Code, Config, Event, Session, Start, View};
use mainstay_protocol::registry::FOLD_VERSION;
use serde_json::json;

use crate::args;
use crate::data::with_client;
use crate::failure::Failure;
use crate::output::Output;

/// What was seen of a session.
struct Seen {
    first: u64,
    tail: u64,
    records: u64,
    /// The view was folded from the first record on, or read whole, and is the server's.
    compared: bool,
}

/// What is wrong with a session, and where.
struct Wrong {
    seq: u64,
    what: String,
}

/// Why a session was not looked at to its end.
enum Stopped {
    /// It was deleted meanwhile.
    Gone,
    Wrong(Wrong),
    Failed(ClientError),
}

impl From<ClientError> for Stopped {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Gone => Self::Gone,
            ClientError::Refused { code: Code::SESSION_NOT_FOUND | Code::SESSION_GONE, .. } => Self::Gone,
            ClientError::Refused { code: Code::SESSION_DAMAGED, value, message } => {
                Self::Wrong(Wrong { seq: value, what: message })
            }
            error => Self::Failed(error),
        }
    }
}

pub(crate) async fn run(args: args::Verify, output: Output) -> Result<(), Failure> {
    let mut config = Config::default();
    config.give_up_after = Some(Duration::from_secs(5));
    with_client(args.connect.as_deref(), config, output, async |client| look(client, &args.prefix, output).await).await
}

async fn look(client: &Client, prefix: &str, output: Output) -> Result<(), Failure> {
    let (mut sessions, mut records, mut compared) = (0u64, 0u64, 0u64);
    let mut damaged = None;
    for listed in client.list(prefix).await? {
        let name = listed.name.as_str();
        match session(client, name).await {
            Ok(seen) => {
                sessions += 1;
                records += seen.records;
                compared += u64::from(seen.compared);
                let event = json!({
                    "event": "session", "name": name, "first": seen.first, "tail": seen.tail,
                    "records": seen.records, "view_compared": seen.compared,
                });
                output.event(&event, String::new)?;
            }
            Err(Stopped::Gone) => {}
            Err(Stopped::Failed(error)) => return Err(error.into()),
            Err(Stopped::Wrong(Wrong { seq, what })) => {
                let event = json!({"event": "damage", "session": name, "seq": seq, "what": what});
                output.event(&event, || format!("damage: session {name}: seq {seq}: {what}\n"))?;
                damaged.get_or_insert_with(|| format!("session {name} at seq {seq}: {what}"));
            }
        }
    }
    if let Some(first) = damaged {
        return Err(Failure::integrity(first));
    }
    let event = json!({"event": "verified", "sessions": sessions, "records": records, "views_compared": compared});
    output.event(&event, || {
        format!("{sessions} sessions with {records} records are whole; the views of {compared} are what their records add up to")
    })
}

/// Reads a session up to the tail that it has when it is attached to.
async fn session(client: &Client, name: &str) -> Result<Seen, Stopped> {
    let session = client.session(name)?.attach().await?;
    let info = session.info();
    let mut reading = session.subscribe(Start::Earliest).open().await?;
    let (mut view, mut next, mut records) = (View::default(), info.first, 0);
    // What was trimmed or put together is not there to be folded.
    let mut whole = info.first == 0 && info.fold_version == FOLD_VERSION;
    let wrong = |seq: u64, what: &str| Stopped::Wrong(Wrong { seq, what: what.to_owned() });
    while next < info.tail {
        match reading.next().await.ok_or(Stopped::Gone)?? {
            Event::Started { next: begins, .. } => {
                whole &= begins == next;
                next = next.max(begins);
            }
            Event::Gap { to, .. } => (whole, next) = (false, to),
            Event::Compacted => whole = false,
            Event::Records(batch) => {
                if batch.from() != next {
                    return Err(wrong(next, "records are missing"));
                }
                let mut due = next;
                for read in batch.iter() {
                    let read = read?;
                    if read.seq >= info.tail {
                        break;
                    }
                    if read.seq != due && whole {
                        return Err(wrong(due, "a record is missing"));
                    }
                    (due, records) = (read.seq + 1, records + 1);
                    view.pass_over(read.seq);
                    let folded = view.fold_record(&Arc::new(read.author.clone()), read.time, &read.record);
                    folded.map_err(|error| wrong(read.seq, error.detail))?;
                }
                next = batch.next();
            }
            _ => {}
        }
    }
    let compared = if whole {
        view.pass_over(info.tail);
        if view.hash() != info.view_hash {
            return Err(wrong(info.tail, "the server's view is not what the records below add up to"));
        }
        true
    } else {
        snapshot(&session, info.tail).await?
    };
    Ok(Seen { first: info.first, tail: info.tail, records, compared })
}

/// Reads the view itself and compares it with its hash. False if the session went on meanwhile.
async fn snapshot(session: &Session, tail: u64) -> Result<bool, Stopped> {
    let mut reading = session.subscribe(Start::Snapshot).open().await?;
    loop {
        if let Event::Snapshot(view) = reading.next().await.ok_or(Stopped::Gone)?? {
            let info = session.info();
            if view.next() != tail || info.tail != tail {
                return Ok(false);
            }
            let what = "the server's view has another hash than it says".to_owned();
            return if view.hash() == info.view_hash {
                Ok(true)
            } else {
                Err(Stopped::Wrong(Wrong { seq: tail, what }))
            };
        }
    }
}
