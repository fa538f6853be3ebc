//! What an earlier `run` said before it was killed, and what is in its outbox still.

use core::time::Duration;
use std::collections::BTreeMap;

use mainstay_client::{
    ClientError, Code, Detail, EntryState, Kept, Outbox, Payload, Record, Run, RunEnd, RunId, Session, Status,
};
use serde_json::json;

use super::agent::{Stopped, TOGETHER, item, settled};
use crate::args;
use crate::commands::outbox::tell;
use crate::failure::Failure;
use crate::output::Output;

/// Stores it, and ends the runs that it is part of: nobody works on them any more. What cannot be stored, because a run is over or somebody else
/// holds it by now, is told and forgotten.
pub(super) async fn store(
    outbox: &Outbox,
    stopped: &Stopped,
    session: &Session,
    args: &args::Run,
    output: Output,
) -> Result<(), Failure> {
    let kept = outbox.kept();
    if kept.is_empty() {
        return Ok(());
    }
    output.event(&json!({"event": "leftover", "entries": kept.len()}), || {
        format!("storing {} records that an earlier run left in the outbox, once its lease is over", kept.len())
    })?;
    // What is sent already, or is refused because its run is lost by now.
    for kept in &kept {
        settled(&kept.entry, stopped.clone()).await?;
    }
    let (mut of_runs, mut lost) = (BTreeMap::<(RunId, u64), Vec<(u64, Record)>>::new(), Vec::new());
    for Kept { entry, records, run: epoch, .. } in kept {
        match (entry.state(), records, epoch) {
            (EntryState::Durable { .. }, ..) => {}
            (EntryState::Rejected { code: Code::RUN_FENCED, .. }, Some((_, records)), Some(epoch)) => {
                for record in records {
                    // What is refused for its run names it.
                    let Some(run) = record.run else { continue };
                    of_runs.entry((run, epoch)).or_default().push((entry.number(), record));
                }
            }
            _ => {
                tell(&entry, &json!({}), output)?;
                lost.push(entry.number());
            }
        }
    }
    outbox.dismiss(&lost).await?;
    for ((id, epoch), records) in of_runs {
        match take(session, id, epoch, Duration::from_secs_f64(args.lease)).await? {
            Ok(run) => again(outbox, stopped, session, &run, records).await?,
            Err(why) => {
                let numbers: Vec<u64> = records.iter().map(|(number, _)| *number).collect();
                let message = format!("{} records of run {id} are not stored: {why}", numbers.len());
                output.warning("RUN_FENCED", &message)?;
                outbox.dismiss(&numbers).await?;
            }
        }
    }
    Ok(())
}

/// Takes a run that nobody works on any more, as soon as its lease is over. `Err` with the reason if somebody went on with it, or it is over.
async fn take(session: &Session, id: RunId, epoch: u64, lease: Duration) -> Result<Result<Run, &'static str>, Failure> {
    const OTHER: &str = "somebody else went on with the run";
    const OVER: &str = "the run is over";
    let mut live = session.live().await?;
    match live.current().await?.runs().get(id) {
        None => return Ok(Err(OVER)),
        Some(run) if run.epoch != epoch => return Ok(Err(OTHER)),
        Some(_) => {}
    }
    match session.take_run(Some(id), lease).await {
        Ok(run) if run.taken_over() == Some(epoch) => Ok(Ok(run)),
        Ok(run) => {
            run.release().await?;
            Ok(Err(OTHER))
        }
        Err(ClientError::Refused { code: Code::RUN_OVER, .. }) => Ok(Err(OVER)),
        Err(error) => Err(error.into()),
    }
}

/// Puts records into the outbox again, as part of the run that is held again, and ends it behind them.
async fn again(
    outbox: &Outbox,
    stopped: &Stopped,
    session: &Session,
    run: &Run,
    records: Vec<(u64, Record)>,
) -> Result<(), Failure> {
    let mut left = records.as_slice();
    let mut last = None;
    while !left.is_empty() {
        let mut bytes = 0;
        let fits = left.iter().take_while(|(_, record)| {
            bytes += record.encoded_len();
            bytes <= TOGETHER
        });
        let (some, rest) = left.split_at(fits.count().max(1));
        let items = some.iter().map(|(_, record)| item(session, record, run)).collect::<Result<Vec<_>, _>>()?;
        let numbers: Vec<u64> = some.iter().map(|(number, _)| *number).collect();
        // In one write: a crash must neither lose them nor have them twice.
        last = outbox.queue_all(items, &numbers).await?.pop();
        left = rest;
    }
    let detail = Detail::new("the command that ran it was killed");
    let end = RunEnd { status: Status::Interrupted, detail }.record(0);
    let end = outbox.queue(item(session, &end, run)?).await?;
    for entry in last.iter().chain([&end]) {
        settled(entry, stopped.clone()).await?;
    }
    Ok(())
}
