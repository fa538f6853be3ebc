//! `signal`: wants something of a session's agent, from anywhere.

use core::time::Duration;
use std::path::Path;

use mainstay_client::{Client, Config, EntryState, Intent, Item, LiveView, SignalId, SignalOutcome, Target, Update};
use serde_json::json;

use super::outbox;
use crate::args;
use crate::data::{patiently, with_client};
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::serve::signalled;

pub(crate) async fn run(args: args::Signal, output: Output) -> Result<(), Failure> {
    if let Some(dir) = &args.outbox {
        return kept(dir, &args, output).await;
    }
    with_client(args.connect.connect.as_deref(), Config::default(), output, async |client| {
        tokio::select! {
            result = send(client, &args, output) => result,
            () = signalled() => Err(Failure::failed("INTERRUPTED", "interrupted; whether it was sent is not known")),
        }
    })
    .await
}

/// The same through an outbox.
async fn kept(dir: &Path, args: &args::Signal, output: Output) -> Result<(), Failure> {
    let (outbox, _) = outbox::open(dir, &args.session, output).await?;
    let target = args.run.map(Target::Run).or(args.input.map(Target::Input)).or(args.request.map(Target::Request));
    let mut item = Item::signal(args.intent.into(), target, args.text.clone().unwrap_or_default())?;
    if let Some(lasts) = args.lasts {
        item = item.lasts(Duration::from_secs_f64(lasts));
    }
    if let Some(seconds) = args.valid_for {
        item = item.valid_until(outbox::until(seconds));
    }
    let entry = outbox.queue(item).await?;
    outbox::tell(&entry, &json!({}), output)?;
    let mut config = Config::default();
    config.give_up_after = None;
    let result = with_client(args.connect.connect.as_deref(), config, output, async |client| {
        let work = async { Ok(entry.settled().await) };
        outbox::deliver(client, client.session(&args.session)?, &outbox, work, core::future::ready(())).await
    })
    .await?;
    outbox::tell(&entry, &json!({}), output)?;
    outbox.dismiss(&[entry.number()]).await?;
    if let EntryState::Durable { seq } = result {
        output.text(&format!("{} accepted as seq {seq}\n", Intent::from(args.intent).as_str()))?;
    }
    outbox::unstored(&[result])
}

async fn send(client: &Client, args: &args::Signal, output: Output) -> Result<(), Failure> {
    let session = patiently(client, &args.session, output, client.session(&args.session)?.attach()).await?;
    // Before it is sent: what becomes of it may come at once.
    let mut live = if args.wait { Some(session.live().await?) } else { None };
    let mut signal = session.signal(args.intent.into());
    if let Some(run) = args.run {
        signal = signal.run(run);
    }
    if let Some(input) = args.input {
        signal = signal.input(input);
    }
    if let Some(request) = args.request {
        signal = signal.request(request);
    }
    if let Some(lasts) = args.lasts {
        signal = signal.lasts(Duration::from_secs_f64(lasts));
    }
    let signal = signal.text(args.text.clone().unwrap_or_default());
    let (id, intent) = (signal.id(), Intent::from(args.intent).as_str());
    let seq = patiently(client, &args.session, output, signal.send()).await?;
    let event = json!({"event": "accepted", "signal": id.to_string(), "intent": intent, "seq": seq});
    output.event(&event, || format!("{intent} accepted as seq {seq}"))?;
    let Some(live) = &mut live else { return Ok(()) };
    let (outcome, by) = outcome(live, id, seq).await?;
    let event = json!({"event": "outcome", "signal": id.to_string(), "outcome": outcome.as_str(), "seq": by});
    output.event(&event, || format!("{intent} {} at seq {by}", outcome.as_str()))?;
    match outcome {
        SignalOutcome::Consumed => Ok(()),
        other => Err(Failure {
            exit: Exit::Refused,
            code: other.as_str().replace(' ', "_").to_uppercase(),
            message: format!("the {intent} was {}", other.as_str()),
            retryable: false,
        }),
    }
}

/// What became of a signal, or of the one that it found in its place.
async fn outcome(live: &mut LiveView, id: SignalId, seq: u64) -> Result<(SignalOutcome, u64), Failure> {
    loop {
        let found = live.view().signals().resolved().find(|resolved| resolved.id == id || resolved.seq == seq).copied();
        if let Some(found) = found {
            return Ok((found.outcome, found.by));
        }
        match live.next().await {
            Some(Ok(Update::Ended)) | None => {
                return Err(Failure::failed("GONE", "the session ended before anything became of the signal"));
            }
            Some(update) => drop(update?),
        }
    }
}
