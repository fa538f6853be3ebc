//! `run`: any process as a session's agent.

mod agent;
mod events;
mod process;

use std::io::Write as _;

use mainstay_client::{
    Client, ClientError, Code, Config, Detail, Doing, Folded, Intent, Kind, LiveView, Membership, MessageAppend,
    MessageEnd, MessageId, MessageStart, Payload, RequestExpired, Resolution, Run, RunConsumed, RunEnd, RunLost,
    Session, Signal, SignalId, SignalResolved, Signals, Status, StreamId, Update,
};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, sleep_until};

use self::agent::{Agent, fenced};
use self::process::{About, Process, Taken};
use super::serve::signalled;
use crate::args;
use crate::data::{patiently, with_client};
use crate::failure::Failure;
use crate::output::Output;

/// Bytes taken from the process at once.
const AT_ONCE: usize = 16 * 1024;
/// A line of events that is longer is no event.
const MAX_LINE: usize = 200 * 1024;
/// A message takes no more, and another one begins: less than a session lets a message hold (spec MSG-5).
const FULL: usize = 1000 * 1024;
/// How long a process that is gone may take to have its last output read: what it left behind may hold the pipe.
const REST: Duration = Duration::from_secs(2);
/// How long what is left may take to be stored once the command is told to end.
const LAST: Duration = Duration::from_secs(5);

pub(crate) async fn run(args: args::Run, output: Output) -> Result<(), Failure> {
    // The process goes on whatever the network does.
    let mut config = Config::default();
    (config.give_up_after, config.producer_bytes) = (None, 16 << 20);
    with_client(args.connect.connect.as_deref(), config, async |client| {
        let begun = tokio::select! {
            begun = begin(client, &args, output) => begun?,
            () = signalled() => return Err(Failure::failed("INTERRUPTED", "interrupted before the run began")),
        };
        tokio::select! {
            result = begun.work(output) => result,
            result = warn(client, output) => result,
        }
    })
    .await
}

/// Tells of every loss of the server, for as long as the command runs.
async fn warn(client: &Client, output: Output) -> Result<(), Failure> {
    let mut connection = client.connection();
    while let Some(connected) = connection.changed().await {
        if !connected {
            output.warning("UNAVAILABLE", "the server is lost; the process goes on, and what it says waits")?;
        }
    }
    core::future::pending().await
}

/// What the process says, on its way to records.
enum Saying {
    /// One message, part by part.
    Text { message: Option<MessageId>, len: usize, cut: Vec<u8> },
    /// Events, line by line.
    Events { line: Vec<u8> },
}

/// How the run ended.
struct Ended {
    status: Status,
    detail: String,
    /// The exit code of the process, if it had one.
    exit: Option<i32>,
}

struct Work<'a> {
    args: &'a args::Run,
    agent: Agent,
    process: Process,
    taken: mpsc::Receiver<Taken>,
    live: LiveView,
    signals: Signals,
    membership: Membership,
    stream: StreamId,
    saying: Saying,
    /// The seq behind the last input that was given to the process.
    given: u64,
    /// What the process does, as far as others were told.
    status: String,
    last_output: Instant,
    /// How it is to end, if somebody wants it to, and why.
    ending: Option<(Status, String)>,
    /// The bytes of the message that it goes on with.
    _partial: Option<tempfile::NamedTempFile>,
}

async fn begin<'a>(client: &Client, args: &'a args::Run, output: Output) -> Result<Work<'a>, Failure> {
    let attaching = client.session(&args.session)?.create();
    let session = patiently(client, &args.session, output, attaching.attach()).await?;
    let stream = if args.stream == "main" { session.main() } else { session.stream(&args.stream).await? };
    let program = args.command.first().map(std::path::Path::new).and_then(|path| path.file_name());
    let name = args.name.clone().or_else(|| Some(program?.to_string_lossy().into_owned()));
    let name = name.unwrap_or_else(|| "agent".to_owned());
    let grace = Duration::from_secs_f64(args.lease.clamp(1.0, 120.0));
    let status = if args.standby { "standby" } else { "thinking" };
    let membership = session.join(&name, grace, Doing::new(status)?).await?;
    let producer = session.producer(&format!("run-{:032x}", rand::random::<u128>())).await?;
    // Before the run begins: a signal to it may come at once.
    let signals = session.signals().await?;
    let mut live = session.live_rolled_up(Duration::from_millis(50)).await?;
    let run = hold(args, &session, output).await?;
    // From there on everything else is seen, too.
    let epoch = run.epoch();
    while live.view().next() <= epoch {
        match live.next().await {
            Some(update) => drop(update?),
            None => return Err(Failure::failed("GONE", "the session ended before the run began")),
        }
    }
    let mut environment = vec![
        ("MAINSTAY_SESSION", args.session.clone()),
        ("MAINSTAY_RUN", run.id().to_string()),
        ("MAINSTAY_EPOCH", epoch.to_string()),
    ];
    let open = run.open_messages(live.view()).next().cloned();
    let partial = match (&open, run.taken_over()) {
        (Some(message), Some(_)) => {
            let mut file = tempfile::NamedTempFile::new().map_err(|error| Failure::io("a temporary file", &error))?;
            file.write_all(&message.text).map_err(|error| Failure::io("a temporary file", &error))?;
            environment.push(("MAINSTAY_OFFSET", message.text.len().to_string()));
            environment.push(("MAINSTAY_PARTIAL", file.path().display().to_string()));
            Some(file)
        }
        _ => None,
    };
    let event = json!({
        "event": "run", "run": run.id().to_string(), "epoch": epoch, "taken_over": run.taken_over().is_some(),
        "message": open.as_ref().map(|message| message.id.to_string()),
        "offset": open.as_ref().map(|message| message.text.len()),
    });
    output.event(&event, || match run.taken_over() {
        Some(_) => {
            let offset = open.as_ref().map_or(0, |message| message.text.len());
            format!("took over run {} of {} at byte {offset} of its message", run.id(), args.session)
        }
        None => format!("run {} of {} has begun", run.id(), args.session),
    })?;
    if args.standby {
        membership.update(Doing::new("thinking")?).await?;
    }
    let patience = Duration::from_secs_f64(args.patience);
    let (process, taken) = match Process::start(&args.command, environment, patience) {
        Ok(started) => started,
        Err(failure) => {
            let end = run.end(&producer, Status::Error, &failure.message).await?;
            end.wait().await?;
            return Err(failure);
        }
    };
    let saying = match args.events {
        true => Saying::Events { line: Vec::new() },
        false => Saying::Text {
            len: open.as_ref().map_or(0, |message| message.text.len()),
            message: open.map(|message| message.id),
            cut: Vec::new(),
        },
    };
    Ok(Work {
        args,
        agent: Agent::new(session, producer, run),
        process,
        taken,
        live,
        signals,
        membership,
        stream,
        saying,
        given: 0,
        status: "thinking".to_owned(),
        last_output: Instant::now(),
        ending: None,
        _partial: partial,
    })
}

/// Begins the run, or waits until it can be taken over.
async fn hold(args: &args::Run, session: &Session, output: Output) -> Result<Run, Failure> {
    let lease = Duration::from_secs_f64(args.lease);
    if args.standby {
        output.event(&json!({"event": "standby", "session": args.session}), || {
            format!("standing by for a run of {} that is lost", args.session)
        })?;
        return Ok(session.take_run(args.run, lease).await?);
    }
    let run = match args.run {
        Some(run) => session.start_run_as(run, lease, args.input).await,
        None => session.start_run(lease, args.input).await,
    };
    run.map_err(|error| match error {
        ClientError::Refused { code: Code::RUN_ACTIVE, .. } => {
            let advice =
                "wait for it with --standby, or allow several with `mainstay session configure --runs parallel`";
            let failure = Failure::from(error);
            Failure { message: format!("{}; {advice}", failure.message), ..failure }
        }
        error => error.into(),
    })
}

impl Work<'_> {
    /// Runs to the end, and leaves.
    async fn work(mut self, output: Output) -> Result<(), Failure> {
        let result = self.serve(output).await;
        // A server that does not answer finds out by itself.
        let _ = tokio::time::timeout(Duration::from_secs(2), self.membership.leave()).await;
        let Ended { status, detail, exit } = result?;
        let event = json!({"event": "ended", "status": status.as_str(), "detail": detail, "exit": exit});
        output.event(&event, || format!("the run is {}", status.as_str()))?;
        match status {
            Status::Complete => Ok(()),
            Status::Error => Err(Failure::failed("FAILED", format!("the process failed: {detail}"))),
            _ => Err(Failure::failed("STOPPED", format!("the run was stopped: {detail}"))),
        }
    }

    async fn serve(&mut self, output: Output) -> Result<Ended, Failure> {
        let stop = signalled();
        tokio::pin!(stop);
        let mut stopped = false;
        let renewing = Duration::from_secs_f64(self.args.lease / 3.0);
        let mut renew_at = Instant::now() + renewing;
        let mut buffer = vec![0; AT_ONCE];
        let (mut read, mut exited) = (true, None);
        let mut drain_until = None;
        self.give_inputs()?;
        while read || exited.is_none() {
            let stall = self.args.stall.map(|seconds| self.last_output + Duration::from_secs_f64(seconds));
            let stall = stall.filter(|_| !matches!(self.status.as_str(), "stalled" | "paused"));
            let stops_at = self.process.stops_at().filter(|_| exited.is_none());
            tokio::select! {
                count = self.process.stdout.read(&mut buffer), if read && self.agent.has_room() => {
                    let count = count.map_err(|error| Failure::io("the output of the process", &error))?;
                    read = count > 0;
                    if read {
                        self.last_output = Instant::now();
                        self.say(&buffer[..count]).await?;
                    }
                }
                result = self.agent.progress(), if self.agent.waits() => {
                    if let Err(error) = result {
                        self.recover(error, output).await?;
                    }
                }
                status = self.process.child.wait(), if exited.is_none() => {
                    let status = status.map_err(|error| Failure::io("the process", &error))?;
                    exited = Some(status);
                    drain_until = Some(Instant::now() + REST);
                }
                () = sleep_until(drain_until.unwrap_or(renew_at)), if drain_until.is_some() && self.agent.has_room() => read = false,
                () = sleep_until(renew_at) => {
                    renew_at = Instant::now() + renewing;
                    // The process lives, or its last words are on their way.
                    self.agent.run().renew().await?;
                }
                () = sleep_until(stall.unwrap_or(renew_at)), if stall.is_some() => self.doing("stalled").await?,
                () = sleep_until(stops_at.unwrap_or(renew_at)), if stops_at.is_some() => self.process.insist(),
                Some((about, open)) = self.taken.recv() => self.taken(about, open).await?,
                signal = self.signals.next() => match signal {
                    Some(signal) => self.signalled(&signal, output).await?,
                    None => return Err(self.agent_ended().await),
                },
                update = self.live.next() => match update {
                    Some(Ok(Update::Ended)) | None => return Err(self.agent_ended().await),
                    Some(update) => {
                        update?;
                        self.give_inputs()?;
                    }
                },
                () = &mut stop, if !stopped => {
                    stopped = true;
                    self.end_as(Status::Cancelled, "the agent was told to stop where it runs");
                }
            }
        }
        let (status, detail) = match (&self.ending, exited) {
            (Some((status, why)), _) => (*status, why.clone()),
            (None, Some(exited)) if exited.success() => (Status::Complete, String::new()),
            (None, Some(exited)) => (Status::Error, exited.to_string()),
            (None, None) => (Status::Error, "the process closed its output".to_owned()),
        };
        self.finish(status, &detail).await?;
        let settled = self.settle(output);
        tokio::select! {
            result = settled => result?,
            () = async { if stopped { tokio::time::sleep(LAST).await } else { signalled().await } } => {
                return Err(Failure::failed("INTERRUPTED", "interrupted; the last records of the run may not be stored"));
            }
        }
        Ok(Ended { status, detail, exit: exited.and_then(|exited| exited.code()) })
    }

    async fn agent_ended(&mut self) -> Failure {
        Failure::from(self.live.session().ended().await)
    }

    async fn doing(&mut self, status: &str) -> Result<(), Failure> {
        if self.status != status {
            status.clone_into(&mut self.status);
            self.membership.update(Doing::new(status)?).await?;
        }
        Ok(())
    }

    fn end_as(&mut self, status: Status, why: &str) {
        self.ending.get_or_insert_with(|| (status, why.to_owned()));
        self.process.stop();
    }

    /// The process said something.
    async fn say(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if let Saying::Events { line } = &mut self.saying {
            line.extend_from_slice(bytes);
            while let Saying::Events { line } = &mut self.saying {
                let end = line.iter().position(|byte| *byte == b'\n');
                let Some(end) = end.or_else(|| (line.len() > MAX_LINE).then_some(MAX_LINE)) else { break };
                let rest = line.split_off((end + 1).min(line.len()));
                let mut whole = core::mem::replace(line, rest);
                if whole.last() == Some(&b'\n') {
                    whole.pop();
                }
                self.event(&whole).await?;
            }
            return Ok(());
        }
        self.doing("streaming").await?;
        self.text(bytes, false).await
    }

    /// Text of the message. A character that is cut waits for its rest, unless this is the last.
    async fn text(&mut self, bytes: &[u8], last: bool) -> Result<(), Failure> {
        let Saying::Text { message, len, cut } = &mut self.saying else { return Ok(()) };
        let mut bytes = [core::mem::take(cut), bytes.to_vec()].concat();
        if !last {
            *cut = bytes.split_off(whole_characters(&bytes));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let stream = self.stream;
        let full = message.filter(|_| *len + bytes.len() > FULL);
        if let Some(id) = full {
            self.agent.say_of(stream, id, &end_of(Status::Complete, "")).await?;
            (*message, *len) = (None, 0);
        }
        let id = match *message {
            Some(id) => id,
            None => {
                let id = MessageId(rand::random());
                let label = |text| mainstay_client::Label::new(text).map_err(ClientError::from);
                let start = MessageStart { role: label("assistant")?, content_type: label(&self.args.content_type)? };
                self.agent.say_of(stream, id, &start).await?;
                *message.insert(id)
            }
        };
        *len += bytes.len();
        self.agent.say_of(stream, id, &MessageAppend(bytes.into())).await
    }

    async fn event(&mut self, line: &[u8]) -> Result<(), Failure> {
        if line.is_empty() {
            return Ok(());
        }
        let run = self.agent.run().id();
        match events::read(line, run, self.stream, &self.args.content_type) {
            Some(said) => {
                for record in said.records {
                    self.agent.append(record).await?;
                }
                if let Some(doing) = said.doing {
                    self.status.clear();
                    self.membership.update(doing).await?;
                }
                Ok(())
            }
            None => self.agent.append(events::bare(self.stream, line)).await,
        }
    }

    /// Gives the process the inputs that came since.
    fn give_inputs(&mut self) -> Result<(), Failure> {
        let view = self.live.view();
        let Some(run) = view.runs().get(self.agent.run().id()) else { return Ok(()) };
        let given = self.given;
        for input in view.runs().waiting_for(run).filter(|input| input.seq >= given) {
            let Some(message) = view.messages().get(input.message) else { continue };
            let line = if self.args.events { events::input(message) } else { message.text.clone() };
            if !self.process.give(line, About::Input(input.seq)) {
                // It reads nothing: the rest waits in the session.
                break;
            }
            self.given = input.seq + 1;
        }
        Ok(())
    }

    /// The process can have read a line, or cannot.
    async fn taken(&mut self, about: About, open: bool) -> Result<(), Failure> {
        match about {
            About::Input(through) if open => self.agent.say(self.stream, &RunConsumed { through }).await,
            About::Input(_) | About::Nothing => Ok(()),
            About::Signal(signal) if open => self.resolve(signal, Resolution::Consumed, "").await,
            About::Signal(signal) => self.resolve(signal, Resolution::Rejected, "the process reads no input").await,
        }
    }

    async fn resolve(&mut self, signal: SignalId, outcome: Resolution, detail: &str) -> Result<(), Failure> {
        self.agent.say(self.stream, &SignalResolved { signal, outcome, detail: Detail::new(detail) }).await
    }

    async fn signalled(&mut self, told: &Folded, output: Output) -> Result<(), Failure> {
        if told.record.run != Some(self.agent.run().id()) {
            return Ok(());
        }
        if told.record.kind == Kind::RUN_LOST {
            let lost = RunLost::of(&told.record).map_err(ClientError::from)?;
            if self.agent.lost(lost.epoch).await? {
                output
                    .warning("RUN_LOST", "the run was lost while nothing was heard of this agent; taking it again")?;
            }
            return Ok(());
        }
        if let Some(expired) = events::payload::<RequestExpired>(&told.record) {
            let line = json!({"type": "request.expired", "request": expired.request.to_string()}).to_string();
            // Whether it reads that concerns nobody.
            self.process.give(line.into_bytes(), About::Nothing);
            return Ok(());
        }
        let Ok(signal) = Signal::of(&told.record) else { return Ok(()) };
        let text = String::from_utf8_lossy(&signal.text).into_owned();
        output.json_only(&json!({
            "event": "signal", "signal": signal.id.to_string(), "intent": signal.intent.as_str(), "text": text, "seq": told.seq,
        }))?;
        match signal.intent {
            Intent::Cancel | Intent::Interrupt => {
                let status = if signal.intent == Intent::Cancel { Status::Cancelled } else { Status::Interrupted };
                let said = if text.is_empty() { String::new() } else { format!(": {text}") };
                self.end_as(status, &format!("{} by {}{said}", status.as_str(), told.author));
                self.resolve(signal.id, Resolution::Consumed, "").await
            }
            Intent::Pause => {
                self.process.pause();
                self.doing("paused").await?;
                self.resolve(signal.id, Resolution::Consumed, "").await
            }
            Intent::Resume => {
                self.process.resume();
                self.last_output = Instant::now();
                self.doing("thinking").await?;
                self.resolve(signal.id, Resolution::Consumed, "").await
            }
            Intent::Steer | Intent::Custom | Intent::Approve | Intent::Deny | Intent::Reply => {
                let line = match (self.args.events, signal.text.is_empty()) {
                    (true, _) => events::signal(&signal),
                    (false, true) => signal.intent.as_str().as_bytes().to_vec(),
                    (false, false) => signal.text.to_vec(),
                };
                match self.process.give(line, About::Signal(signal.id)) {
                    true => Ok(()),
                    false => self.resolve(signal.id, Resolution::Rejected, "the process reads no input").await,
                }
            }
        }
    }

    /// Something was refused.
    async fn recover(&mut self, error: mainstay_client::AppendError, output: Output) -> Result<(), Failure> {
        match &error.error {
            // Somebody else said what became of it first.
            ClientError::Refused { code: Code::ALREADY_RESOLVED, .. } => {
                self.agent.forget();
                Ok(())
            }
            ClientError::Refused { code: Code::RUN_OVER, message, .. } => Err(fenced(message)),
            _ => {
                self.agent.recover(error).await?;
                output.warning("RUN_LOST", "the run was lost for a while; it is held again, and nothing is missing")
            }
        }
    }

    /// Ends the message and the run.
    async fn finish(&mut self, status: Status, detail: &str) -> Result<(), Failure> {
        if let Saying::Events { line } = &mut self.saying {
            let line = core::mem::take(line);
            self.event(&line).await?;
        }
        self.text(&[], true).await?;
        if let Saying::Text { message: Some(id), .. } = self.saying {
            self.agent.say_of(self.stream, id, &end_of(status, detail)).await?;
        }
        self.agent.say(self.stream, &RunEnd { status, detail: Detail::new(detail) }).await
    }

    /// Waits until everything is stored.
    async fn settle(&mut self, output: Output) -> Result<(), Failure> {
        while self.agent.waits() {
            if let Err(error) = self.agent.progress().await {
                self.recover(error, output).await?;
            }
        }
        Ok(())
    }
}

fn end_of(status: Status, detail: &str) -> MessageEnd {
    MessageEnd { status, detail: Detail::new(detail) }
}

/// How many bytes of `text` are whole characters, or no text at all: at most three wait for their rest.
fn whole_characters(text: &[u8]) -> usize {
    match std::str::from_utf8(text) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => text.len(),
    }
}
