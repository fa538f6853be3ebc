//! What `append`, `signal` and `run` share about an outbox.

use core::time::Duration;
use std::path::Path;
use std::time::SystemTime;

use mainstay_client::{Attaching, Client, Code, EntryState, Kept, Outbox, OutboxEntry, OutboxError, SendError};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::serve::signalled;

/// How long a server may be out of reach once nothing more is queued.
const PATIENCE: Duration = Duration::from_secs(60);

impl From<OutboxError> for Failure {
    fn from(error: OutboxError) -> Self {
        let exit = match &error {
            OutboxError::Damaged { .. } => Exit::Integrity,
            OutboxError::Invalid(_) => Exit::Usage,
            _ => Exit::Failed,
        };
        let retryable = matches!(error, OutboxError::Full | OutboxError::Locked(_));
        Self { exit, code: error.name().into(), message: error.to_string(), retryable }
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Client(error) => error.into(),
            SendError::Outbox(error) => error.into(),
            error => Self::failed("OUTBOX_LOCKED", error.to_string()),
        }
    }
}

/// Until when something that may wait for `seconds` is sent.
pub(crate) fn until(seconds: f64) -> SystemTime {
    SystemTime::now() + Duration::from_secs_f64(seconds)
}

/// Opens the outbox of a session, and says what it holds from before. Returns what of that waits.
pub(crate) async fn open(dir: &Path, session: &str, output: Output) -> Result<(Outbox, Vec<Kept>), Failure> {
    let outbox = Outbox::open(dir, session).await?;
    let mut kept = outbox.kept();
    for kept in &kept {
        tell(&kept.entry, &json!({"line": null}), output)?;
    }
    if kept.iter().any(|kept| kept.run.is_some()) {
        let dir = dir.display();
        let message = format!(
            "it holds what an agent said; `mainstay run {session} --outbox {dir} -- …` stores that and goes on"
        );
        output.notice("outbox", &message)?;
    }
    let seen: Vec<u64> = kept
        .iter()
        .filter(|kept| kept.run.is_none() && kept.entry.state().is_settled())
        .map(|kept| kept.entry.number())
        .collect();
    outbox.dismiss(&seen).await?;
    if !kept.is_empty() && !output.is_json() {
        output.notice("outbox", &format!("{} entries are in the outbox from before", kept.len()))?;
    }
    kept.retain(|kept| !kept.entry.state().is_settled());
    Ok((outbox, kept))
}

/// Says how far an entry has come; `more` are fields of the event.
pub(crate) fn tell(entry: &OutboxEntry, more: &Value, output: Output) -> Result<(), Failure> {
    let state = entry.state();
    let name = if matches!(state, EntryState::Durable { .. }) { "ack" } else { state.as_str() };
    let mut event = json!({"event": name, "entry": entry.number()});
    if let Some(sequence) = entry.sequence() {
        event["sequence"] = json!(sequence);
    }
    match &state {
        EntryState::Durable { seq } => event["seq"] = json!(seq),
        EntryState::Rejected { code, detail } => {
            event["code"] = json!(code.to_string());
            event["message"] = json!(detail);
        }
        _ => {}
    }
    if let (Some(event), Some(more)) = (event.as_object_mut(), more.as_object()) {
        event.extend(more.clone());
    }
    output.json_only(&event)?;
    if output.is_json() {
        return Ok(());
    }
    let number = entry.number();
    match state {
        EntryState::Rejected { code, detail } => {
            let (what, next) = match code {
                Code::OUTCOME_UNKNOWN => ("is given up", "; look whether the session has it before you send it again"),
                _ => ("is not stored", ""),
            };
            output.warning(&code.to_string(), &format!("entry {number} of the outbox {what}: {detail}{next}"))
        }
        EntryState::Expired => output.warning(
            "EXPIRED",
            &format!("entry {number} of the outbox is not stored: its time was over before it was sent"),
        ),
        _ => Ok(()),
    }
}

/// What happened to entries that were to be stored and are not.
pub(crate) fn unstored(states: &[EntryState]) -> Result<(), Failure> {
    let rejected = states.iter().filter_map(|state| match state {
        EntryState::Rejected { code, detail } => Some((code, detail)),
        _ => None,
    });
    let (count, all) = (rejected.clone().count(), states.len());
    let expired = states.iter().filter(|state| **state == EntryState::Expired).count();
    let refused = |code: String, message: String| Failure { exit: Exit::Refused, code, message, retryable: false };
    match rejected.into_iter().next() {
        Some((code, detail)) => Err(refused(
            code.to_string(),
            format!("{count} of {all} entries were refused, the first one because: {detail}"),
        )),
        None if expired > 0 => Err(refused(
            "EXPIRED".into(),
            format!("{expired} of {all} entries were not sent before their time was over"),
        )),
        None => Ok(()),
    }
}

/// Sends what is in the outbox until `work` is done, which waits for it. From when `closing` resolves on the server may be out of
/// reach for a minute at most.
pub(crate) async fn deliver<T>(
    client: &Client,
    attaching: Attaching,
    outbox: &Outbox,
    work: impl Future<Output = Result<T, Failure>>,
    closing: impl Future<Output = ()>,
) -> Result<T, Failure> {
    let stays = |failure: Failure| {
        let (waiting, session) = (outbox.waiting(), outbox.session());
        let dir = outbox.path().parent().unwrap_or(Path::new(".")).display();
        let of_an_agent = outbox.kept().iter().any(|kept| kept.run.is_some() && !kept.entry.state().is_settled());
        let again = match of_an_agent {
            true => format!("`mainstay run {session} --outbox {dir} -- …` stores what an agent said, and the rest"),
            false => format!("`mainstay append {session} --outbox {dir} </dev/null` sends them"),
        };
        let message = match waiting {
            0 => failure.message,
            _ => format!("{}; {waiting} entries stay in the outbox, {again}", failure.message),
        };
        Failure { message, ..failure }
    };
    let sending = outbox.send(attaching);
    let patience = async {
        closing.await;
        out_of_reach(client).await
    };
    tokio::pin!(work, sending, patience);
    let failure = tokio::select! {
        biased;
        result = &mut work => return result,
        error = &mut sending => Failure::from(error),
        failure = &mut patience => failure,
        () = signalled() => Failure::failed("INTERRUPTED", "interrupted"),
    };
    // What was settled at the end is told first.
    let told = tokio::time::timeout(Duration::from_millis(100), &mut work).await;
    Err(stays(if let Ok(Err(first)) = told { first } else { failure }))
}

/// Waits until there was no connection for a minute.
async fn out_of_reach(client: &Client) -> Failure {
    let mut connection = client.connection();
    let mut deadline = (!connection.is_up()).then(|| Instant::now() + PATIENCE);
    loop {
        tokio::select! {
            changed = connection.changed() => match changed {
                Some(true) => deadline = None,
                Some(false) => deadline = Some(Instant::now() + PATIENCE),
                None => return core::future::pending().await,
            },
            () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                return Failure {
                    exit: Exit::Unreachable,
                    code: "UNREACHABLE".into(),
                    message: format!("the server was out of reach for {} s", PATIENCE.as_secs()),
                    retryable: true,
                };
            }
        }
    }
}
