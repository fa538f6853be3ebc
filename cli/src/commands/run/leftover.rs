//! What an earlier `run` said before it was killed, and what is in its outbox still.

use core::time::Duration;
use std::collections::BTreeMap;

use mainstay_client::{
    ClientError, Code, Detail, EntryState, Instance, Kept, Kind, Outbox, Payload, Record, Run, RunEnd, RunId, Session,
    Status,
};
use serde_json::json;

use super::agent::{Stopped, item, queue_again, settled};
use crate::args;
use crate::commands::outbox::tell;
use crate::failure::Failure;
use crate::output::Output;

/// Stores it, and ends the runs that the command before held: nobody works on them any more. What cannot be stored, because a run is over or
/// somebody else holds it by now, is told and forgotten.
pub(super) async fn store(
    outbox: &Outbox,
    stopped: &Stopped,
    session: &Session,
    args: &args::Run,
    me: Instance,
    output: Output,
) -> Result<(), Failure> {
    let kept = outbox.kept();
    if !kept.is_empty() {
        output.event(&json!({"event": "leftover", "entries": kept.len()}), || {
            format!("storing {} records that an earlier run left in the outbox", kept.len())
        })?;
    }
    // What is sent already, or is refused because its run is lost by now.
    for kept in &kept {
        settled(&kept.entry, stopped.clone()).await?;
    }
    let (mut of_runs, mut lost) = (BTreeMap::<RunId, Vec<(u64, u64, Record)>>::new(), Vec::new());
    for Kept { entry, records, run: epoch, .. } in kept {
        match (entry.state(), records, epoch) {
            (EntryState::Durable { .. }, ..) => {}
            (EntryState::Rejected { code: Code::RUN_FENCED, .. }, Some((_, records)), Some(epoch)) => {
                for record in records {
                    // What is refused for its run names it.
                    let Some(run) = record.run else { continue };
                    of_runs.entry(run).or_default().push((epoch, entry.number(), record));
                }
            }
            _ => {
                tell(&entry, &json!({}), output)?;
                lost.push(entry.number());
            }
        }
    }
    outbox.dismiss(&lost).await?;
    let mut live = session.live().await?;
    let view = live.current().await?;
    // Runs that the command before held and said nothing more of end, too; but for one that this one is to go on with.
    let held = view.runs().current().iter().filter(|run| run.holder.instance == me && Some(run.id) != args.run);
    for run in held {
        of_runs.entry(run.id).or_default();
    }
    for (id, mut records) in of_runs {
        let mine = match view.runs().get(id) {
            None => Err("the run is over"),
            Some(run) if run.holder.instance != me => Err("somebody else went on with the run"),
            Some(_) => match session.start_run_as(id, Duration::from_secs_f64(args.lease), None).await {
                Ok(run) => Ok(run),
                Err(ClientError::Refused { code: Code::RUN_OVER | Code::RUN_ACTIVE, .. }) => {
                    Err("somebody else went on with the run")
                }
                Err(error) => return Err(error.into()),
            },
        };
        match mine {
            Ok(run) => {
                // What was put there again under a newer epoch came before what was not.
                records.sort_by_key(|(epoch, number, _)| (core::cmp::Reverse(*epoch), *number));
                let records = records.into_iter().map(|(_, number, record)| (number, record)).collect();
                again(outbox, stopped, session, &run, records).await?;
            }
            Err(why) => {
                let numbers: Vec<u64> = records.iter().map(|(_, number, _)| *number).collect();
                let message = format!("{} records of run {id} are not stored: {why}", numbers.len());
                output.warning("RUN_FENCED", &message)?;
                outbox.dismiss(&numbers).await?;
            }
        }
    }
    Ok(())
}

/// Puts records into the outbox again, as part of the run that is held again, and ends it behind them.
async fn again(
    outbox: &Outbox,
    stopped: &Stopped,
    session: &Session,
    run: &Run,
    records: Vec<(u64, Record)>,
) -> Result<(), Failure> {
    let mut wait = queue_again(outbox, session, run, &records).await?;
    if records.last().is_none_or(|(_, record)| record.kind != Kind::RUN_END) {
        let detail = Detail::new("the command that ran it was killed");
        let end = RunEnd { status: Status::Interrupted, detail }.record(0);
        wait.push(outbox.queue(item(session, &end, run)?).await?);
    }
    for entry in &wait {
        settled(entry, stopped.clone()).await?;
    }
    Ok(())
}
