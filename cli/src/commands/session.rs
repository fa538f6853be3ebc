//! `session`: create, configure, list, show, close, trim, delete.

use core::time::Duration;

use mainstay_client::{Client, Config, InputPolicy, RunMode, Session, SessionInfo};
use serde_json::{Value, json};

use crate::args::{self, SessionAction};
use crate::data::with_client;
use crate::failure::{About as _, Failure};
use crate::output::{Output, time};

pub(crate) async fn run(args: args::Session, output: Output) -> Result<(), Failure> {
    let mut config = Config::default();
    // Somebody waits for one answer, not for a server to come back.
    config.give_up_after = Some(Duration::from_secs(5));
    with_client(args.connect.as_deref(), config, output, async |client| act(client, args.action, output).await).await
}

async fn act(client: &Client, action: SessionAction, output: Output) -> Result<(), Failure> {
    match action {
        SessionAction::Create { session, expire_after } => {
            let mut attaching = client.session(&session)?.create_new();
            if let Some(seconds) = expire_after {
                attaching = attaching.expire_after(Duration::from_secs(seconds));
            }
            let info = attaching.attach().await.about(&session)?.info();
            output.event(&row("created", &info), || format!("created {session} ({})", info.incarnation))
        }
        SessionAction::Configure { session, runs, inputs } => {
            let (runs, inputs): (RunMode, InputPolicy) = (runs.into(), inputs.into());
            let configured = client.session(&session)?.create().attach().await.about(&session)?;
            let seq = configured.configure(runs, inputs).await.about(&session)?;
            let event = json!({
                "event": "configured", "name": session, "runs": runs.as_str(), "inputs": inputs.as_str(), "seq": seq,
            });
            output.event(&event, || {
                format!("configured {session}: runs {}, inputs {} (seq {seq})", runs.as_str(), inputs.as_str())
            })
        }
        SessionAction::Ls { prefix } => list(client, &prefix, output).await,
        SessionAction::Show { session } => {
            let info = existing(client, &session).await?.info();
            output.event(&row("session", &info), || show(&info))
        }
        SessionAction::Close { session } => {
            let seq = existing(client, &session).await?.close().await.about(&session)?;
            let event = json!({"event": "closed", "name": session, "seq": seq});
            output.event(&event, || format!("closed {session}; its last record is seq {seq}"))
        }
        SessionAction::Trim { session, before } => {
            let first = existing(client, &session).await?.trim(before).await.about(&session)?;
            let event = json!({"event": "trimmed", "name": session, "first": first});
            output.event(&event, || format!("trimmed {session}; its first record is seq {first}"))
        }
        SessionAction::Delete { session } => {
            existing(client, &session).await?.delete().await.about(&session)?;
            output.event(&json!({"event": "deleted", "name": session}), || format!("deleted {session}"))
        }
    }
}

/// A session that is there.
async fn existing(client: &Client, session: &str) -> Result<Session, Failure> {
    client.session(session)?.attach().await.about(session)
}

async fn list(client: &Client, prefix: &str, output: Output) -> Result<(), Failure> {
    let sessions = client.list(prefix).await?;
    if sessions.is_empty() {
        output.text("no sessions\n")?;
    }
    for session in sessions {
        let event = json!({
            "event": "session",
            "name": session.name.as_str(),
            "incarnation": session.incarnation.to_string(),
            "created": time(session.created),
            "first": session.first,
            "tail": session.tail,
        });
        output.event(&event, || {
            let records = session.tail - session.first;
            format!("{}  {records:>10} records  {}", time(session.created), session.name)
        })?;
    }
    Ok(())
}

fn row(event: &str, info: &SessionInfo) -> Value {
    json!({
        "event": event,
        "name": info.name.as_str(),
        "incarnation": info.incarnation.to_string(),
        "created": time(info.created),
        "first": info.first,
        "tail": info.tail,
        "closed": info.closed,
        "fold_version": info.fold_version,
        "view_hash": info.view_hash.to_string(),
        "streams": info.streams,
        "producers": info.producers.iter().map(|(name, epoch, next)| {
            json!({"name": name, "epoch": epoch, "next": next})
        }).collect::<Vec<_>>(),
    })
}

fn show(info: &SessionInfo) -> String {
    let mut lines = vec![
        format!("session      {}", info.name),
        format!("incarnation  {}", info.incarnation),
        format!("created      {}", time(info.created)),
        format!("state        {}", if info.closed { "closed" } else { "open" }),
        format!("records      {} (seqs {}..{})", info.tail - info.first, info.first, info.tail),
        format!("streams      {}", info.streams.join(", ")),
        format!("view hash    {} (fold version {})", info.view_hash, info.fold_version),
    ];
    for (name, epoch, next) in &info.producers {
        lines.push(format!("producer     {name}: epoch {epoch}, next sequence {next}"));
    }
    lines.join("\n")
}
