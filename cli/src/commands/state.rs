//! `state`: the session's shared keys and values.

use core::ops::ControlFlow;
use core::time::Duration;
use std::io::Read;

use bytes::Bytes;
use mainstay_client::{
    AppendError, Change, Client, ClientError, Code, Config, Entry, Expected, Folded, Key, Kind, LiveView, Payload,
    Record, Session, StateChange, StateDeleted, StateExpired, StatePut, Stored, Update,
};
use serde_json::{Value, json};

use super::watch::watch;
use crate::args::{self, StateAction};
use crate::data::with_client;
use crate::failure::{About as _, Exit, Failure};
use crate::output::{Output, Screen, time};
use crate::rows;

pub(crate) async fn run(args: args::State, output: Output) -> Result<(), Failure> {
    let mut config = Config::default();
    if !matches!(args.action, StateAction::Watch { .. }) {
        // Somebody waits for one answer, not for a server to come back.
        config.give_up_after = Some(Duration::from_secs(5));
    }
    with_client(args.connect.as_deref(), config, output, async |client| act(client, args.action, output).await).await
}

async fn act(client: &Client, action: StateAction, output: Output) -> Result<(), Failure> {
    match action {
        StateAction::Get { session, key } => {
            let view = read(client, &session).await?;
            match view.view().state().get(&key) {
                Some(entry) if output.is_json() => output.json_only(&row(&key, entry)),
                Some(entry) => output.raw(&entry.value),
                None => {
                    let message = format!("session {session} has no value for key {key}");
                    Err(Failure { exit: Exit::Failed, code: "NO_VALUE".into(), message, retryable: false })
                }
            }
        }
        StateAction::Ls { session, prefix } => {
            let view = read(client, &session).await?;
            let mut screen = Screen::new(output);
            list(&view, &prefix, &mut screen);
            screen.show().await
        }
        StateAction::Put { session, key, value, lasts } => {
            let put = StatePut { key: name(&key)?, value: given(value)?, lasts: lasts.map_or(0, millis) };
            write(client, &session, &key, &put, output).await
        }
        StateAction::Cas { session, key, value, expect } => {
            let change = Change::Put { value: given(value)?, lasts: 0 };
            write(client, &session, &key, &StateChange { key: name(&key)?, expected: expect.into(), change }, output)
                .await
        }
        StateAction::Incr { session, key, by } => {
            let change = StateChange { key: name(&key)?, expected: Expected::Any, change: Change::Increment(by) };
            write(client, &session, &key, &change, output).await
        }
        StateAction::Merge { session, key, patch } => {
            let change = Change::Merge(given(patch)?);
            write(client, &session, &key, &StateChange { key: name(&key)?, expected: Expected::Any, change }, output)
                .await
        }
        StateAction::Delete { session, key, expect: None } => {
            write(client, &session, &key, &StateDeleted { key: name(&key)? }, output).await
        }
        StateAction::Delete { session, key, expect: Some(expect) } => {
            let change = StateChange { key: name(&key)?, expected: expect.into(), change: Change::Delete };
            write(client, &session, &key, &change, output).await
        }
        StateAction::Watch { session, prefix } => {
            watch(client, &session, true, output, |view, update, screen| {
                match update {
                    Update::Started => {
                        screen.json_only(&json!({"event": "snapshot", "next": view.view().next()}));
                        list(view, &prefix, screen);
                    }
                    Update::Record(folded) => changed(view, &folded, &prefix, screen)?,
                    _ => {}
                }
                Ok(ControlFlow::Continue(()))
            })
            .await
        }
    }
}

fn name(key: &str) -> Result<Key, Failure> {
    Ok(Key::new(key).map_err(ClientError::from)?)
}

fn millis(seconds: f64) -> u64 {
    // A value that lasts no time at all would last for ever.
    ((seconds * 1000.0).round() as u64).max(1)
}

/// The value on the command line, or standard input.
fn given(value: Option<String>) -> Result<Bytes, Failure> {
    if let Some(value) = value {
        return Ok(value.into());
    }
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).map_err(|error| Failure::io("standard input", &error))?;
    Ok(bytes.into())
}

/// The view of a session that must exist.
async fn read(client: &Client, session: &str) -> Result<LiveView, Failure> {
    let mut view = client.session(session)?.live().await.about(session)?;
    view.current().await.about(session)?;
    Ok(view)
}

/// Appends one record and tells the revision that it made.
async fn write(
    client: &Client,
    session: &str,
    key: &str,
    payload: &impl Payload,
    output: Output,
) -> Result<(), Failure> {
    let session: Session = client.session(session)?.create().attach().await.about(session)?;
    let record: Record = session.main().record(payload);
    let mut tries = 0;
    let stored = loop {
        // One name for all of them: a session keeps a limited number of producers, and each run would use one up.
        let producer = session.producer("state").await?;
        let stored = match producer.append_record(record.clone()).await {
            Ok(ticket) => ticket.await,
            Err(error) => Err(error),
        };
        // Another one opened it meanwhile, and nothing was stored.
        let displaced = matches!(
            &stored,
            Err(AppendError { stored: Stored::NotCommitted, error: ClientError::Refused { code: Code::FENCED, .. } })
        );
        if !displaced || tries == DISPLACED {
            break stored;
        }
        tries += 1;
        tokio::time::sleep(Duration::from_millis(rand::random_range(1..20) * tries)).await;
    };
    let revision = stored.map_err(|error| match &error.error {
        ClientError::Refused { code: Code::CONFLICT, value, .. } => {
            let is = match value.checked_sub(1) {
                Some(revision) => format!("its revision is {revision}"),
                None => "it has no value".to_owned(),
            };
            Failure { message: format!("key {key} is not as expected: {is}; read it and try again"), ..error.into() }
        }
        _ => error.into(),
    })?;
    output.event(&json!({"event": "ack", "key": key, "revision": revision}), || format!("{key} revision {revision}"))
}

/// How often a command that others displace tries again.
const DISPLACED: u64 = 50;

/// Tells what a record did to a key.
fn changed(view: &LiveView, folded: &Folded, prefix: &str, screen: &mut Screen) -> Result<(), Failure> {
    let record = &folded.record;
    let (key, expired) = match record.kind {
        Kind::STATE_PUT => (StatePut::of(record).map_err(ClientError::from)?.key, false),
        Kind::STATE_DELETED => (StateDeleted::of(record).map_err(ClientError::from)?.key, false),
        Kind::STATE_EXPIRED => (StateExpired::of(record).map_err(ClientError::from)?.key, true),
        _ => return Ok(()),
    };
    let key = key.as_str();
    if !key.starts_with(prefix) {
        return Ok(());
    }
    match view.view().state().get(key) {
        Some(entry) if record.kind == Kind::STATE_PUT => show(key, entry, screen),
        _ => {
            let event = json!({"event": "removed", "key": key, "seq": folded.seq, "expired": expired});
            screen.event(&event, || format!("{key} {}", if expired { "expired" } else { "deleted" }));
        }
    }
    Ok(())
}

fn list(view: &LiveView, prefix: &str, screen: &mut Screen) {
    let entries = view.view().state().iter().filter(|(key, _)| key.as_str().starts_with(prefix));
    entries.for_each(|(key, entry)| show(key.as_str(), entry, screen));
}

fn show(key: &str, entry: &Entry, screen: &mut Screen) {
    screen.event(&row(key, entry), || format!("{key} = {}", String::from_utf8_lossy(&entry.value)));
}

fn row(key: &str, entry: &Entry) -> Value {
    let mut row = json!({
        "event": "state",
        "key": key,
        "revision": entry.revision,
        "author": entry.author.to_string(),
    });
    if let Some(at) = entry.expires {
        row["expires"] = json!(time(at));
    }
    rows::bytes(&mut row, "value", &entry.value);
    row
}
