//! `run`: any process as a session's agent.

mod agent;
mod events;
mod leftover;
mod process;

use core::pin::Pin;
use std::collections::BTreeSet;
use std::io::Write as _;

use mainstay_client::{
    Author, Client, ClientError, Code, Config, Continuity, Detail, Doing, Folded, InputPolicy, Intent, LiveView,
    Membership, MessageAppend, MessageEnd, MessageId, MessageStart, Outbox, RequestExpired, Resolution, Run,
    RunConsumed, RunEnd, SendError, Session, Signal, SignalId, SignalResolved, Signals, Status, StreamId, Update,
};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep_until};

use self::agent::{Agent, Stopped, Way, fenced};
use self::process::{About, Process, Taken};
use crate::args;
use crate::data::{patiently, with_client};
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::serve::signalled;

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
    let outbox = match &args.outbox {
        Some(dir) => {
            let outbox = Outbox::open(dir, &args.session).await?;
            // The same client as the command before it: the runs that it held are this one's.
            config.continuity = Continuity::in_file(&outbox.path().with_extension("client"))?;
            Some(outbox)
        }
        None => None,
    };
    with_client(args.connect.connect.as_deref(), config, output, async |client| {
        let (tell, stopped) = watch::channel(None);
        let sending = async {
            if let Some(outbox) = &outbox {
                let error = match outbox.send(client.session(&args.session)?.create()).await {
                    SendError::Client(error) => error,
                    error => ClientError::Invalid(error.to_string()),
                };
                tell.send_replace(Some(error));
            }
            core::future::pending::<Result<(), Failure>>().await
        };
        let kept = outbox.clone().map(|outbox| (outbox, stopped));
        let working = async {
            let begun = tokio::select! {
                begun = begin(client, &args, kept, output) => begun?,
                () = signalled() => return Err(Failure::failed("INTERRUPTED", "interrupted before the run began")),
            };
            let told = begun.process.told.clone();
            // Time for the process to end, and for its last words to be stored.
            let last = Duration::from_secs_f64(2.0 * args.patience) + REST + LAST;
            tokio::select! {
                result = begun.work(output) => result,
                () = forced(told, last) => {
                    let stays = if outbox.is_some() { "; they stay in the outbox" } else { "" };
                    let message = format!("interrupted; the last records of the run may not be stored{stays}");
                    Err(Failure::failed("INTERRUPTED", message))
                }
            }
        };
        tokio::select! {
            result = working => result,
            result = sending => result,
        }
    })
    .await
}

/// Waits until this command was told to end twice, or once and long ago.
async fn forced(mut told: watch::Receiver<bool>, last: Duration) {
    if told.wait_for(|told| *told).await.is_err() {
        // The process has ended.
        return core::future::pending().await;
    }
    tokio::select! {
        () = signalled() => {}
        () = tokio::time::sleep(last) => {}
    }
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

/// The text of an input that the view does not keep, on its way from the log.
type Reading = Pin<Box<dyn Future<Output = (u64, Result<Option<Vec<u8>>, ClientError>)> + Send>>;

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
    /// The epoch under which this agent began: signals before it are those of the view.
    begun: u64,
    /// Seqs of signals that were acted upon, and that the view may still have.
    handled: BTreeSet<u64>,
    /// The seq behind the last input that was given to the process.
    given: u64,
    reading: Option<Reading>,
    /// What the process does, as far as it or this said, and whether others were told that it is stalled.
    doing: Doing,
    status: String,
    stalled: bool,
    last_output: Instant,
    /// How it is to end, if somebody wants it to, and why.
    ending: Option<(Status, String)>,
    /// The bytes of the message that it goes on with.
    _partial: Option<tempfile::NamedTempFile>,
}

async fn begin<'a>(
    client: &Client,
    args: &'a args::Run,
    outbox: Option<(Outbox, Stopped)>,
    output: Output,
) -> Result<Work<'a>, Failure> {
    let attaching = client.session(&args.session)?.create();
    let session = patiently(client, &args.session, output, attaching.attach()).await?;
    let stream = if args.stream == "main" { session.main() } else { session.stream(&args.stream).await? };
    let program = args.command.first().map(std::path::Path::new).and_then(|path| path.file_name());
    let name = args.name.clone().or_else(|| Some(program?.to_string_lossy().into_owned()));
    let name = name.unwrap_or_else(|| "agent".to_owned());
    let grace = Duration::from_secs_f64(args.lease.clamp(1.0, 120.0));
    let status = if args.standby { "standby" } else { "thinking" };
    let membership = session.join(&name, grace, Doing::new(status)?).await?;
    let way = match outbox {
        Some((outbox, stopped)) => {
            leftover::store(&outbox, &stopped, &session, args, client.instance(), output).await?;
            Way::Outbox(outbox, stopped)
        }
        None => Way::Producer(session.producer(&format!("run-{:032x}", rand::random::<u128>())).await?),
    };
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
    let partial = match &open {
        Some(message) => {
            let mut file = tempfile::NamedTempFile::new().map_err(|error| Failure::io("a temporary file", &error))?;
            file.write_all(&message.text).map_err(|error| Failure::io("a temporary file", &error))?;
            environment.push(("MAINSTAY_OFFSET", message.text.len().to_string()));
            environment.push(("MAINSTAY_PARTIAL", file.path().display().to_string()));
            Some(file)
        }
        None => None,
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
            let why = RunEnd { status: Status::Error, detail: Detail::new(&failure.message) };
            let mut agent = Agent::new(session, way, run);
            agent.say(stream, &why).await?;
            agent.progress().await?;
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
        agent: Agent::new(session, way, run),
        process,
        taken,
        live,
        signals,
        membership,
        stream,
        saying,
        begun: epoch,
        handled: BTreeSet::new(),
        given: 0,
        reading: None,
        doing: Doing::new("thinking")?,
        status: "thinking".to_owned(),
        stalled: false,
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
        if result.is_err() {
            self.give_up(&result).await;
        }
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

    /// This cannot go on: stops the process as somebody would, and ends the run where that is possible.
    async fn give_up(&mut self, result: &Result<Ended, Failure>) {
        self.process.stop();
        let patience = Duration::from_secs_f64(3.0 * self.args.patience);
        let mut rest = vec![0; AT_ONCE];
        let ended = async {
            loop {
                tokio::select! {
                    _ = self.process.child.wait() => return,
                    // One that waits for its output to be read does not end.
                    read = self.process.stdout.read(&mut rest) => if read.unwrap_or(0) == 0 {
                        let _ = self.process.child.wait().await;
                        return;
                    },
                }
            }
        };
        let _ = tokio::time::timeout(patience, ended).await;
        if let Err(failure) = result
            && failure.code != "FENCED"
        {
            let why = RunEnd { status: Status::Error, detail: Detail::new(failure.message.clone()) };
            let end = async {
                if self.agent.say(self.stream, &why).await.is_ok() {
                    while self.agent.waits() && self.agent.progress().await.is_ok() {}
                }
            };
            let _ = tokio::time::timeout(Duration::from_secs(2), end).await;
        }
    }

    async fn serve(&mut self, output: Output) -> Result<Ended, Failure> {
        let renewing = Duration::from_secs_f64(self.args.lease / 3.0);
        let mut renew_at = Instant::now() + renewing;
        let mut buffer = vec![0; AT_ONCE];
        let (mut read, mut exited) = (true, None);
        let mut told = self.process.told.clone();
        let mut drain_until = None;
        self.pending_signals(output).await?;
        self.give_inputs()?;
        while read || exited.is_none() {
            if exited.is_some() && (drain_until.is_none() || !self.agent.has_room()) {
                drain_until = Some(Instant::now() + REST);
            }
            let stall = self.args.stall.map(|seconds| self.last_output + Duration::from_secs_f64(seconds));
            let stall = stall.filter(|_| !self.stalled && !matches!(self.status.as_str(), "waiting" | "paused"));
            let drain = drain_until.filter(|_| read && self.agent.has_room());
            tokio::select! {
                count = self.process.stdout.read(&mut buffer), if read && self.agent.has_room() => {
                    let count = count.map_err(|error| Failure::io("the output of the process", &error))?;
                    read = count > 0;
                    self.heard(&buffer[..count]).await?;
                    drain_until = None;
                }
                result = self.agent.progress(), if self.agent.waits() => {
                    if let Err(error) = result {
                        self.recover(error, output).await?;
                    }
                }
                status = self.process.child.wait(), if exited.is_none() => {
                    exited = Some(status.map_err(|error| Failure::io("the process", &error))?);
                }
                () = sleep_until(drain.unwrap_or(renew_at)), if drain.is_some() => {
                    // Something that the process left behind may hold the pipe; what is in it is still read.
                    match tokio::time::timeout(Duration::ZERO, self.process.stdout.read(&mut buffer)).await {
                        Ok(Ok(count)) if count > 0 => self.heard(&buffer[..count]).await?,
                        _ => read = false,
                    }
                    drain_until = None;
                }
                () = sleep_until(renew_at) => {
                    renew_at = Instant::now() + renewing;
                    // The process lives, or its last words are on their way.
                    self.agent.run().renew().await?;
                }
                () = sleep_until(stall.unwrap_or(renew_at)), if stall.is_some() => {
                    self.stalled = true;
                    self.membership.update(Doing::new("stalled")?).await?;
                }
                Some((about, open)) = self.taken.recv() => self.taken(about, open).await?,
                (through, text) = maybe(&mut self.reading) => {
                    self.reading = None;
                    self.input_read(through, text?, output)?;
                    self.give_inputs()?;
                }
                signal = self.signals.next() => match signal {
                    Some(told) => self.signalled(&told, output).await?,
                    None => return Err(closed()),
                },
                update = self.live.next() => match update {
                    Some(Ok(Update::Ended)) | None => return Err(closed()),
                    Some(update) => {
                        update?;
                        self.look_after_run(output).await?;
                        self.pending_signals(output).await?;
                        self.give_inputs()?;
                    }
                },
                Ok(()) = told.changed() => self.end_as(Status::Cancelled, "the agent was told to stop where it runs"),
            }
        }
        let (status, detail) = match (&self.ending, exited) {
            (Some((status, why)), _) => (*status, why.clone()),
            (None, Some(exited)) if exited.success() => (Status::Complete, String::new()),
            (None, Some(exited)) => (Status::Error, exited.to_string()),
            (None, None) => (Status::Error, "the process closed its output".to_owned()),
        };
        self.finish(status, &detail).await?;
        while self.agent.waits() {
            tokio::select! {
                result = self.agent.progress() => {
                    if let Err(error) = result {
                        self.recover(error, output).await?;
                    }
                }
                () = sleep_until(renew_at) => {
                    renew_at = Instant::now() + renewing;
                    self.agent.run().renew().await?;
                }
            }
        }
        Ok(Ended { status, detail, exit: exited.and_then(|exited| exited.code()) })
    }

    /// The process said something.
    async fn heard(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.last_output = Instant::now();
        if core::mem::take(&mut self.stalled) {
            self.membership.update(self.doing.clone()).await?;
        }
        self.say(bytes).await
    }

    /// The run may have been lost, or be somebody else's, without a word to this agent.
    async fn look_after_run(&mut self, output: Output) -> Result<(), Failure> {
        let (view, id, epoch) = (self.live.view(), self.agent.run().id(), self.agent.run().epoch());
        if view.next() <= epoch {
            return Ok(());
        }
        match view.runs().get(id) {
            Some(run) if run.epoch == epoch && run.lost.is_some() => {
                self.agent.retake().await?;
                output.warning("RUN_LOST", "the run was lost while nothing was heard of this agent; it is held again")
            }
            Some(run) if run.epoch > epoch => Err(fenced("another agent took the run over")),
            None if view.closed().is_some() => Err(closed()),
            None => Err(fenced("the run is over")),
            Some(_) => Ok(()),
        }
    }

    async fn doing(&mut self, status: &str) -> Result<(), Failure> {
        if self.status != status {
            self.does(Doing::new(status)?, status).await?;
        }
        Ok(())
    }

    async fn does(&mut self, doing: Doing, status: &str) -> Result<(), Failure> {
        status.clone_into(&mut self.status);
        self.doing = doing.clone();
        self.stalled = false;
        Ok(self.membership.update(doing).await?)
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
                    let status = doing.status().to_owned();
                    self.does(doing, &status).await?;
                }
                Ok(())
            }
            None => self.agent.append(events::bare(self.stream, line)).await,
        }
    }

    /// Gives the process the inputs that came since. Where one stops the run, it and those behind it are for the next one.
    fn give_inputs(&mut self) -> Result<(), Failure> {
        if self.ending.is_some() || self.reading.is_some() {
            return Ok(());
        }
        let view = self.live.view();
        let Some(run) = view.runs().get(self.agent.run().id()) else { return Ok(()) };
        let given = self.given;
        let last = if view.runs().policy() == InputPolicy::Interrupt { run.start } else { u64::MAX };
        for input in view.runs().waiting_for(run).filter(|input| (given..last).contains(&input.seq)) {
            let Some(message) = view.messages().get(input.message) else {
                let (session, id, seqs) = (self.live.session().clone(), input.message, (input.start, input.seq));
                let read = async move { (seqs.1, session.read_message(id, seqs).await) };
                self.reading = Some(Box::pin(read));
                break;
            };
            let line = if self.args.events { events::input(message) } else { message.text.clone() };
            if !self.process.give(line, About::Input(input.seq)) {
                // It reads nothing: the rest waits in the session.
                break;
            }
            self.given = input.seq + 1;
        }
        Ok(())
    }

    /// The text of an input came from the log.
    fn input_read(&mut self, through: u64, text: Option<Vec<u8>>, output: Output) -> Result<(), Failure> {
        if self.ending.is_some() {
            return Ok(());
        }
        let Some(text) = text else {
            self.given = through + 1;
            let what = format!("the input at seq {through} was trimmed before it was read");
            return output.warning("TRIMMED", &what);
        };
        let line = if self.args.events { events::input_text(&text) } else { text };
        if self.process.give(line, About::Input(through)) {
            self.given = through + 1;
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

    /// Acts upon what was wanted of the run before this agent held it, and on what else nobody took.
    async fn pending_signals(&mut self, output: Output) -> Result<(), Failure> {
        let (view, run) = (self.live.view(), self.agent.run().id());
        let pending = view.signals().pending().iter().filter(|pending| pending.run == Some(run));
        let pending: Vec<_> =
            pending.map(|pending| (pending.seq, pending.author.clone(), pending.signal.clone())).collect();
        let next = view.next();
        self.handled.retain(|seq| *seq >= next || pending.iter().any(|(pending, ..)| pending == seq));
        for (seq, author, signal) in pending {
            self.act_upon(seq, &author, &signal, output).await?;
        }
        Ok(())
    }

    async fn signalled(&mut self, told: &Folded, output: Output) -> Result<(), Failure> {
        if told.record.run != Some(self.agent.run().id()) || told.seq < self.begun {
            return Ok(());
        }
        if let Some(expired) = events::payload::<RequestExpired>(&told.record) {
            if self.args.events {
                let line = json!({"type": "request.expired", "request": expired.request.to_string()}).to_string();
                // Whether it reads that concerns nobody.
                self.process.give(line.into_bytes(), About::Nothing);
            }
            return Ok(());
        }
        match Signal::of(&told.record) {
            Ok(signal) => self.act_upon(told.seq, &told.author, &signal, output).await,
            Err(_) => Ok(()),
        }
    }

    /// Does what somebody wants, once.
    async fn act_upon(&mut self, seq: u64, author: &Author, signal: &Signal, output: Output) -> Result<(), Failure> {
        if !self.handled.insert(seq) {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&signal.text).into_owned();
        output.json_only(&json!({
            "event": "signal", "signal": signal.id.to_string(), "intent": signal.intent.as_str(), "text": text, "seq": seq,
        }))?;
        match signal.intent {
            Intent::Cancel | Intent::Interrupt => {
                let status = if signal.intent == Intent::Cancel { Status::Cancelled } else { Status::Interrupted };
                let said = if text.is_empty() { String::new() } else { format!(": {text}") };
                self.end_as(status, &format!("{} by {author}{said}", status.as_str()));
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
                    (true, _) => events::signal(signal),
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
            ClientError::Refused { code: Code::ALREADY_RESOLVED, .. } => self.agent.forget().await,
            ClientError::Refused { code: Code::RUN_OVER, message, .. } => Err(fenced(message)),
            ClientError::Refused { code: Code::SESSION_CLOSED, .. } => Err(closed()),
            // What one line says wrong is not stored; the next ones are.
            ClientError::Refused { code, message, .. } if self.args.events && is_about_one_record(*code) => {
                self.agent.forget().await?;
                output.warning(&code.to_string(), &format!("what the process said is not stored: {message}"))
            }
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
}

/// The session takes nothing more.
fn closed() -> Failure {
    Failure {
        exit: Exit::Refused,
        code: "SESSION_CLOSED".into(),
        message: "the session was closed; no record can follow".into(),
        retryable: false,
    }
}

/// True for refusals that concern what was said alone.
fn is_about_one_record(code: Code) -> bool {
    matches!(
        code,
        Code::MESSAGE_EXISTS
            | Code::MESSAGE_NOT_OPEN
            | Code::CONFLICT
            | Code::STATE_INVALID
            | Code::LIMIT_EXCEEDED
            | Code::ID_IN_USE
            | Code::RECORD_MALFORMED
            | Code::RECORD_TOO_LARGE
            | Code::BATCH_TOO_LARGE
    )
}

/// Waits for what is there to be waited for, for ever if there is nothing.
async fn maybe<T>(waited: &mut Option<Pin<Box<dyn Future<Output = T> + Send>>>) -> T {
    match waited {
        Some(waited) => waited.await,
        None => core::future::pending().await,
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
