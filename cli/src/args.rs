//! The command line, as users see it in `--help`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use clap_complete::Shell;

use crate::data::DEFAULT_NAMESPACE;

/// Durable sessions for long-running AI agents, over QUIC.
///
/// Start a server with `mainstay serve --dev`; in another terminal append with `mainstay append SESSION` and follow with
/// `mainstay tail SESSION`. Client commands find a server on this machine by themselves.
#[derive(Debug, Parser)]
#[command(name = "mainstay", version, propagate_version = true, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by the server, 4 server not reachable, \
    5 stored data is damaged.\n\nEnvironment: MAINSTAY_CONNECT names the connection file, MAINSTAY_DATA the server's data \
    directory, MAINSTAY_LOG what is logged (for example `debug`).";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(Serve),
    Demo(Demo),
    #[command(hide = true)]
    DemoAgent(DemoAgent),
    Append(Append),
    Tail(Tail),
    State(State),
    Presence(Presence),
    Join(Join),
    Run(Run),
    Signal(Signal),
    Notify(Notify),
    Session(Session),
    Token(Token),
    Doctor(Doctor),
    Top(Top),
    Verify(Verify),
    Backup(Backup),
    Restore(Restore),
    Bench(Bench),
    Completions(Completions),
    Man(Man),
}

impl Args {
    /// True if output is to be JSON lines.
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            Command::Serve(args) => args.json,
            Command::Demo(args) => args.json,
            Command::Append(args) => args.json,
            Command::Tail(args) => args.json,
            Command::State(args) => args.json,
            Command::Presence(args) => args.json,
            Command::Join(args) => args.json,
            Command::Run(args) => args.json,
            Command::Signal(args) => args.json,
            Command::Notify(args) => args.json,
            Command::Session(args) => args.json,
            Command::Token(args) => args.json,
            Command::Doctor(args) => args.json,
            Command::Top(args) => args.json,
            Command::Verify(args) => args.json || args.dump,
            Command::Backup(args) => args.json,
            Command::Restore(args) => args.json,
            Command::Bench(args) => args.json,
            Command::DemoAgent(_) | Command::Completions(_) | Command::Man(_) => false,
        }
    }
}

/// Run a server.
///
/// Runs a server until it is told to stop with Ctrl-C or SIGTERM; a second signal stops it at once. SIGUSR1 prints how much
/// memory is in use.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = "\
Settings come from a file, then MAINSTAY_SECTION__NAME variables of the environment, then --set, then flags of their own; what is not
known is refused. `mainstay serve --print-config` prints every setting with what it means and what is done without it. Usually:

  listen = \"0.0.0.0:4433\"
  admin = \"127.0.0.1:9433\"        # metrics, health and status over HTTP
  [tls]
  cert = \"chain.pem\"             # certificate chain, leaf first; needed without --dev
  key = \"key.pem\"
  [auth]
  keys = [\"k4.public.…\"]         # verification keys, as `mainstay token keygen` prints them; several while one is replaced

SIGHUP reads the settings again: keys, issuers and the certificate change at once, everything else at the next start.
Under systemd it takes its socket from a .socket unit (ListenDatagram=) if there is one, and says when it is ready (Type=notify).

Exit codes: 0 stopped when told to, or handed over; 2 wrong arguments or configuration; 5 stored data is damaged, or the disk failed; 1 anything else.")]
pub(crate) struct Serve {
    /// Make keys, a certificate and a token by itself, and write a connection file for clients on this machine.
    #[arg(long)]
    pub(crate) dev: bool,
    /// Directory for all data; made if missing.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// UDP address to listen on; port 0 picks a free one. [default: 127.0.0.1:4433]
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Take the place of the server that runs on this data directory: it says goodbye to its clients, commits, and hands its socket over, and
    /// they go on with this one. With --listen at another address they are told where. Starts as usual if none runs.
    #[arg(long)]
    pub(crate) takeover: bool,
    /// How long after the end of a message its parts are put together in storage, or `never`. Readers that lag so long behind get the
    /// whole text in their place. [default: 60]
    #[arg(long, value_name = "SECS", value_parser = compact_after_text)]
    pub(crate) compact_after: Option<String>,
    /// TCP address for the operator: metrics, health and status over HTTP, without authentication. [default: none]
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) admin: Option<SocketAddr>,
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE", env = "MAINSTAY_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// A setting, for example limits.connections=1000. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Say whether the configuration is good, and start nothing.
    #[arg(long)]
    pub(crate) check: bool,
    /// Print every setting, and start nothing.
    #[arg(long)]
    pub(crate) print_config: bool,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show the whole story on this machine and verify it.
///
/// Plays the story of a session on this machine, with real processes: an agent announces itself, calls a tool and answers; tab one is
/// killed, tab two goes on with the partial answer and the shared state; the server is killed; tab two interrupts the agent; the next
/// agent is killed too, and a standby finishes its answer. Exit code 0 only if every check held.
#[derive(Debug, ClapArgs)]
pub(crate) struct Demo {
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The agent of the demo.
#[derive(Debug, ClapArgs)]
pub(crate) struct DemoAgent {
    /// Milliseconds between two words.
    pub(crate) pause: u64,
}

/// How to find the server.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Connect {
    /// Connection file of the server. [default: the one that `serve --dev` wrote on this machine]
    #[arg(long, value_name = "FILE", env = "MAINSTAY_CONNECT")]
    pub(crate) connect: Option<PathBuf>,
}

/// Append standard input to a session, one record per line.
///
/// Appends each line of standard input as a record as soon as it is read. The session is made if it does not exist. When the
/// server is lost it is tried again for 60 s; no line is lost or stored twice.
#[derive(Debug, ClapArgs)]
pub(crate) struct Append {
    /// Name of the session, for example agent:session123.
    pub(crate) session: String,
    /// Stream of the session to append to.
    #[arg(long, value_name = "S", default_value = "main")]
    pub(crate) stream: String,
    /// Make each line a message of this role instead of a bare record: `user` for what an agent is to read.
    #[arg(long, value_name = "ROLE")]
    pub(crate) role: Option<String>,
    /// Producer to append as; whoever appended under this name before is fenced. [default: a fresh name]
    #[arg(long, value_name = "NAME")]
    pub(crate) producer: Option<String>,
    /// Keep each line in this directory until it is stored: from then on it survives the loss of the network and the end of this process,
    /// and the next `append --outbox` of the session sends it first. Works without a server.
    #[arg(long, value_name = "DIR", conflicts_with = "producer")]
    pub(crate) outbox: Option<PathBuf>,
    /// Seconds after which a line that was not sent must not be sent any more.
    #[arg(long, value_name = "SECS", value_parser = seconds, requires = "outbox")]
    pub(crate) valid_for: Option<f64>,
    /// Print `{"event":"ack","seq":…,"line":…}` for each line once it is durable; with --outbox also `queued`, `rejected` and `expired`, each
    /// with its `entry`.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Show who is in a session and what they are doing.
///
/// Shows who is in a session: people with a window open, agents at work, each with what it is doing.
#[derive(Debug, ClapArgs)]
pub(crate) struct Presence {
    /// Name of the session.
    pub(crate) session: String,
    /// Tell of every change from then on. Waits for the session if it does not exist yet.
    #[arg(long)]
    pub(crate) watch: bool,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Be in a session until interrupted.
///
/// Is in a session until interrupted, and then leaves. The session is made if it does not exist. A loss of the network that is
/// shorter than the grace is not seen by anybody.
#[derive(Debug, ClapArgs)]
pub(crate) struct Join {
    /// Name of the session.
    pub(crate) session: String,
    /// How people call you. [default: the user's name]
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// What you are doing: idle, thinking, streaming, tool:NAME, waiting, or a word of your own.
    #[arg(long, value_name = "S", default_value = "idle")]
    pub(crate) status: String,
    /// Seconds without a sign of life after which you count as lost, from 1 to 120.
    #[arg(long, value_name = "SECS", default_value_t = 10.0, value_parser = grace)]
    pub(crate) grace: f64,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// The grace of a member, in seconds.
fn grace(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (1.0..=120.0).contains(&seconds) { Ok(seconds) } else { Err("not between 1 and 120 seconds".into()) }
}

/// Run any process as a session's agent.
///
/// Runs a process as the session's agent: it is present, holds a run under a lease that is renewed while it lives, and what it
/// prints is a message, part by part. Inputs and steering come as lines on its standard input; a cancel is SIGINT, then SIGTERM; its
/// exit status ends the run. While the server or the network is lost it goes on, and what it prints waits in order.
///
/// The process finds MAINSTAY_SESSION, MAINSTAY_RUN and MAINSTAY_EPOCH in its environment; after a take-over also MAINSTAY_OFFSET, the
/// bytes that the message has already, and MAINSTAY_PARTIAL, a file with them.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = "\
With --events each line of the process is one JSON event of AG-UI:

  {\"type\":\"TEXT_MESSAGE_START\",\"messageId\":\"a\",\"role\":\"assistant\"}   and _CONTENT with \"delta\", _END
  {\"type\":\"REASONING_MESSAGE_START\",\"messageId\":\"b\"}                   and _CONTENT, _END
  {\"type\":\"TOOL_CALL_START\",\"toolCallId\":\"c\",\"toolCallName\":\"ls\"}  and _ARGS with \"delta\", _END
  {\"type\":\"TOOL_CALL_RESULT\",\"toolCallId\":\"c\",\"content\":\"...\"}
  {\"type\":\"CUSTOM\",\"name\":\"state.put\",\"value\":{\"key\":\"k\",\"value\":1}}
  {\"type\":\"CUSTOM\",\"name\":\"status\",\"value\":\"tool:search\"}
  {\"type\":\"CUSTOM\",\"name\":\"request\",\"value\":{\"needs\":\"approval\",\"lasts\":20,\"body\":\"...\"}}

Any other line is stored as a record of its own. Its standard input has JSON lines too: {\"type\":\"input\",\"text\":...},
{\"type\":\"signal\",\"intent\":...,\"text\":...}.

Exit codes: 0 the process succeeded; 1 it failed, was cancelled or cannot be started; 3 the run is held by somebody else; 4 server not \
reachable at the start.")]
pub(crate) struct Run {
    /// Name of the session; it is made if it does not exist.
    pub(crate) session: String,
    /// Seconds without a sign of life after which the run is lost, from 1 to 600.
    #[arg(long, value_name = "SECS", default_value_t = 15.0, value_parser = lease)]
    pub(crate) lease: f64,
    /// Report `stalled` as the agent's status after so many seconds without output.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub(crate) stall: Option<f64>,
    /// How people call the agent. [default: the command's name]
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Wait until the session's run is lost, and go on with it.
    #[arg(long)]
    pub(crate) standby: bool,
    /// Id of the run, to begin or to wait for. [default: a new one; with --standby any]
    #[arg(long, value_name = "ID")]
    pub(crate) run: Option<mainstay_client::RunId>,
    /// Message id of the input that causes the run.
    #[arg(long, value_name = "ID", conflicts_with = "standby")]
    pub(crate) input: Option<mainstay_client::MessageId>,
    /// Take each line that the process prints as a JSON event.
    #[arg(long)]
    pub(crate) events: bool,
    /// Stream of the session for what the process prints.
    #[arg(long, value_name = "S", default_value = "main")]
    pub(crate) stream: String,
    /// Media type of what it prints.
    #[arg(long, value_name = "TYPE", default_value = "text/plain")]
    pub(crate) content_type: String,
    /// Seconds from SIGINT to SIGTERM, and from there to SIGKILL.
    #[arg(long, value_name = "SECS", default_value_t = 5.0, value_parser = seconds)]
    pub(crate) patience: f64,
    /// Keep what the process says in this directory until it is stored: if this command is killed, it is stored the next time that the command runs with
    /// the directory, before the new run begins.
    #[arg(long, value_name = "DIR")]
    pub(crate) outbox: Option<PathBuf>,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connect: Connect,
    /// The process and its arguments.
    #[arg(required = true, last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

/// The lease of a run, in seconds.
fn lease(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (1.0..=600.0).contains(&seconds) { Ok(seconds) } else { Err("not between 1 and 600 seconds".into()) }
}

/// Cancel, interrupt or steer a session's agent, or answer it.
///
/// Wants something of a session's agent. A signal is stored in the session and reaches the agent ahead of everything else, also while
/// nobody can see the other; what becomes of it is stored too. Closing a window or losing the network is never a cancel.
#[derive(Debug, ClapArgs)]
pub(crate) struct Signal {
    /// Name of the session.
    pub(crate) session: String,
    /// What is wanted.
    #[arg(value_enum)]
    pub(crate) intent: Intent,
    /// The run that it is for. [default: the one that is active]
    #[arg(long, value_name = "ID")]
    pub(crate) run: Option<mainstay_client::RunId>,
    /// The input whose run it is for, which need not be there yet.
    #[arg(long, value_name = "ID", conflicts_with = "run")]
    pub(crate) input: Option<mainstay_client::MessageId>,
    /// The request that is answered; needed for approve, deny and reply.
    #[arg(long, value_name = "ID", conflicts_with_all = ["run", "input"],
        required_if_eq_any = [("intent", "approve"), ("intent", "deny"), ("intent", "reply")])]
    pub(crate) request: Option<mainstay_client::RequestId>,
    /// What is said with it: at most 2 KiB.
    #[arg(long, value_name = "T")]
    pub(crate) text: Option<String>,
    /// Seconds after which it expires, if nobody took it; at most a day. [default: a day]
    #[arg(long = "for", value_name = "SECS", value_parser = day)]
    pub(crate) lasts: Option<f64>,
    /// Wait until it is known what became of it; exit code 3 unless it was consumed.
    #[arg(long, conflicts_with = "outbox")]
    pub(crate) wait: bool,
    /// Keep it in this directory until it is stored, behind what is there already: see `append --outbox`.
    #[arg(long, value_name = "DIR")]
    pub(crate) outbox: Option<PathBuf>,
    /// Seconds after which it must not be sent any more, if it was not: for a cancel that is meant for now.
    #[arg(long, value_name = "SECS", value_parser = seconds, requires = "outbox")]
    pub(crate) valid_for: Option<f64>,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Say who is told of what while nobody of them is there, and tell them.
///
/// Notifications: a session's rules say who is told of what. When it happens and no member of the session has their subject, a job waits
/// for its delay, and then for a worker; it is withdrawn as soon as one of them joins, or what it is about is settled.
#[derive(Debug, ClapArgs)]
pub(crate) struct Notify {
    #[command(subcommand)]
    pub(crate) action: NotifyAction,
    /// Print JSON lines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Connection file of the server. [default: the one that `serve --dev` wrote on this machine]
    #[arg(long, value_name = "FILE", env = "MAINSTAY_CONNECT", global = true)]
    pub(crate) connect: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NotifyAction {
    /// Put a rule in force, in the place of one of this name. The session is made if it does not exist.
    Rule {
        /// Name of the session.
        session: String,
        /// Name of the rule.
        name: mainstay_client::Label,
        /// Whom to tell: the subject of people's tokens.
        #[arg(long, value_name = "SUBJECT")]
        principal: mainstay_client::Subject,
        /// Of what.
        #[arg(long, value_enum, value_delimiter = ',', required = true)]
        on: Vec<Trigger>,
        /// Seconds for which it may turn out that nobody needs to be told; at most a day.
        #[arg(long, value_name = "SECS", default_value = "0", value_parser = delay)]
        delay: f64,
        /// Of jobs with the same key for the same principal only the newest is kept.
        #[arg(long, value_name = "KEY")]
        collapse: Option<mainstay_client::Label>,
    },
    /// Take a rule away. Jobs that it has caused stay.
    Unrule {
        /// Name of the session.
        session: String,
        /// Name of the rule.
        name: mainstay_client::Label,
    },
    /// Show the rules of a session, and the jobs that nobody has done.
    Show {
        /// Name of the session.
        session: String,
    },
    /// Take jobs until interrupted, and deliver them.
    #[command(after_long_help = "\
Without --webhook a job counts as delivered once its line is written.

With it each job is sent as a POST with a JSON body, and its key as header Idempotency-Key:

  {\"key\": …, \"session\": …, \"rule\": …, \"principal\": …, \"cause\": \"request.opened\", \"seq\": …, \"time\": …, \"request\": …}

After a crash a job may be sent once more, with the same key.
An answer 2xx means delivered; 400, 410, 413, 422 and redirections mean failed.
Anything else, and no answer within 10 s, is tried again after 1 to 60 s, or what Retry-After says in seconds, until --give-up.
A job that is withdrawn is not tried again.
Jobs in hand when this ends go to other workers.")]
    Work {
        /// Only of sessions whose name starts so.
        #[arg(long, default_value = "")]
        prefix: String,
        /// Send each job to this address, http or https.
        #[arg(long, value_name = "URL")]
        webhook: Option<String>,
        /// Value of the header Authorization that goes with it.
        #[arg(
            long,
            value_name = "VALUE",
            env = "MAINSTAY_WEBHOOK_AUTHORIZATION",
            hide_env_values = true,
            requires = "webhook"
        )]
        authorization: Option<String>,
        /// Seconds after which a job that cannot be delivered counts as failed.
        #[arg(long, value_name = "SECS", default_value_t = 3600.0, value_parser = seconds, requires = "webhook")]
        give_up: f64,
        /// Jobs in hand at once, at most 256.
        #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
        limit: u16,
    },
}

/// Of what somebody is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Trigger {
    /// An agent asks people something.
    Request,
    /// A run has ended.
    RunEnd,
    /// A run was lost.
    RunLost,
    /// A message is complete that is not an input.
    Message,
}

impl core::convert::From<Trigger> for mainstay_client::Kind {
    fn from(trigger: Trigger) -> Self {
        match trigger {
            Trigger::Request => Self::REQUEST_OPENED,
            Trigger::RunEnd => Self::RUN_END,
            Trigger::RunLost => Self::RUN_LOST,
            Trigger::Message => Self::MESSAGE_END,
        }
    }
}

/// A number of seconds up to a day, or none.
fn delay(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.0..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("not between 0 seconds and a day".into()) }
}

/// When finished messages are compacted; `None` for never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CompactAfter(pub(crate) Option<std::time::Duration>);

/// A number of seconds up to a year, or never.
pub(crate) fn compact_after(text: &str) -> Result<CompactAfter, String> {
    if text == "never" {
        return Ok(CompactAfter(None));
    }
    let seconds: f64 = text.parse().map_err(|_| "neither a number of seconds nor `never`".to_owned())?;
    match (0.0..=31_536_000.0).contains(&seconds) {
        true => Ok(CompactAfter(Some(std::time::Duration::from_secs_f64(seconds)))),
        false => Err("not between 0 seconds and a year".into()),
    }
}

/// The same, as it was written.
fn compact_after_text(text: &str) -> Result<String, String> {
    compact_after(text).map(|_| text.to_owned())
}

/// A number of seconds up to a day.
fn day(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.001..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("not between 0.001 seconds and a day".into()) }
}

/// What is wanted of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Intent {
    /// Stop, and finish as cancelled.
    Cancel,
    /// Stop, and go on from what --text says.
    Interrupt,
    /// Take what --text says into account.
    Steer,
    /// Wait.
    Pause,
    /// Go on.
    Resume,
    /// Allow what --request asks for.
    Approve,
    /// Do not allow what --request asks for.
    Deny,
    /// Answer --request with --text.
    Reply,
    /// What the agent makes of it.
    Custom,
}

impl core::convert::From<Intent> for mainstay_client::Intent {
    fn from(intent: Intent) -> Self {
        match intent {
            Intent::Cancel => Self::Cancel,
            Intent::Interrupt => Self::Interrupt,
            Intent::Steer => Self::Steer,
            Intent::Pause => Self::Pause,
            Intent::Resume => Self::Resume,
            Intent::Approve => Self::Approve,
            Intent::Deny => Self::Deny,
            Intent::Reply => Self::Reply,
            Intent::Custom => Self::Custom,
        }
    }
}

/// How many runs may be active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RunMode {
    /// One at a time.
    Single,
    /// Many, each under its lease.
    Parallel,
    /// Many, without leases.
    Open,
}

/// What becomes of an input that comes while a run is active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum InputPolicy {
    /// It waits.
    Enqueue,
    /// It is refused.
    Reject,
    /// The run is told to stop for it.
    Interrupt,
    /// It takes the place of those that wait.
    Latest,
}

impl core::convert::From<RunMode> for mainstay_client::RunMode {
    fn from(mode: RunMode) -> Self {
        match mode {
            RunMode::Single => Self::Single,
            RunMode::Parallel => Self::Parallel,
            RunMode::Open => Self::Open,
        }
    }
}

impl core::convert::From<InputPolicy> for mainstay_client::InputPolicy {
    fn from(policy: InputPolicy) -> Self {
        match policy {
            InputPolicy::Enqueue => Self::Enqueue,
            InputPolicy::Reject => Self::Reject,
            InputPolicy::Interrupt => Self::Interrupt,
            InputPolicy::Latest => Self::Latest,
        }
    }
}

/// Read, write and watch a session's shared keys and values.
///
/// Reads, writes and watches the shared state of a session: keys with values, changed in one order with everything else.
/// Writing makes the session if it does not exist.
#[derive(Debug, ClapArgs)]
pub(crate) struct State {
    #[command(subcommand)]
    pub(crate) action: StateAction,
    /// Print JSON lines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Connection file of the server. [default: the one that `serve --dev` wrote on this machine]
    #[arg(long, value_name = "FILE", env = "MAINSTAY_CONNECT", global = true)]
    pub(crate) connect: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StateAction {
    /// Print the value of a key; exit code 1 if it has none.
    Get {
        /// Name of the session.
        session: String,
        /// The key, for example tool/42.
        key: String,
    },
    /// Give a key a value.
    Put {
        /// Name of the session.
        session: String,
        /// The key.
        key: String,
        /// The value. [default: standard input]
        value: Option<String>,
        /// Seconds after which the value expires.
        #[arg(long = "for", value_name = "SECS", value_parser = seconds)]
        lasts: Option<f64>,
    },
    /// Give a key a value if it is as expected; exit code 3 if it is not.
    Cas {
        /// Name of the session.
        session: String,
        /// The key.
        key: String,
        /// The value. [default: standard input]
        value: Option<String>,
        /// The revision that the key must have, as `get --json` tells it, or `absent`.
        #[arg(long, value_name = "REVISION")]
        expect: Expect,
    },
    /// Add to a key whose value is an integer; no value counts as 0.
    Incr {
        /// Name of the session.
        session: String,
        /// The key.
        key: String,
        /// How much.
        #[arg(default_value_t = 1, allow_negative_numbers = true)]
        by: i64,
    },
    /// Change a key whose value is a JSON document by a JSON merge patch (RFC 7396).
    Merge {
        /// Name of the session.
        session: String,
        /// The key.
        key: String,
        /// The patch. [default: standard input]
        patch: Option<String>,
    },
    /// Take a key's value.
    Delete {
        /// Name of the session.
        session: String,
        /// The key.
        key: String,
        /// Only if the key has this revision.
        #[arg(long, value_name = "REVISION")]
        expect: Option<Expect>,
    },
    /// List keys and values.
    Ls {
        /// Name of the session.
        session: String,
        /// Only keys that start with this.
        #[arg(default_value = "")]
        prefix: String,
    },
    /// List keys and values, then tell of every change. Waits for the session if it does not exist yet.
    Watch {
        /// Name of the session.
        session: String,
        /// Only keys that start with this.
        #[arg(default_value = "")]
        prefix: String,
    },
}

/// What a key must be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expect {
    Absent,
    Revision(u64),
}

impl std::str::FromStr for Expect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "absent" => Ok(Self::Absent),
            number => number.parse().map(Self::Revision).map_err(|_| "neither a revision nor `absent`".into()),
        }
    }
}

impl core::convert::From<Expect> for mainstay_client::Expected {
    fn from(expect: Expect) -> Self {
        match expect {
            Expect::Absent => Self::Absent,
            Expect::Revision(revision) => Self::Revision(revision),
        }
    }
}

/// A number of seconds from a millisecond to a thousand years.
fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.001..=3.2e10).contains(&seconds) { Ok(seconds) } else { Err("not between 0.001 and 3.2e10 seconds".into()) }
}

/// Follow a session: its records so far, then new ones as they come.
///
/// Follows a session. Waits for it if it does not exist yet. Comes back by itself when the server is lost.
#[derive(Debug, ClapArgs)]
pub(crate) struct Tail {
    /// Name of the session.
    pub(crate) session: String,
    /// Where to start: earliest, latest, or a seq. [default: earliest]
    #[arg(long, value_name = "POSITION")]
    pub(crate) from: Option<From>,
    /// Keep the position in this file and go on from it; it goes before --from. On a pipe, rows that may have been printed
    /// before a kill are printed again with "repeat":true: drop one whose seq you have already. A row longer than 4 KiB may be
    /// cut by the kill, in front of the next run's first line.
    #[arg(long, value_name = "F")]
    pub(crate) cursor_file: Option<PathBuf>,
    /// Write rows to this file instead of standard output. With --cursor-file the file is exact whatever happens.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Only records of this stream; may be repeated.
    #[arg(long, value_name = "S")]
    pub(crate) stream: Vec<String>,
    /// Only records of this kind, for example data; may be repeated.
    #[arg(long, value_name = "K")]
    pub(crate) kind: Vec<String>,
    /// Show the conversation as it is now, each message once and whole, and then what is added to it.
    #[arg(long, conflicts_with_all = ["from", "cursor_file", "output", "stream", "kind", "max"])]
    pub(crate) fold: bool,
    /// With --fold: take what is added in steps of so many milliseconds, at most 500. Saves most of the traffic of small parts.
    #[arg(long, value_name = "MS", requires = "fold", value_parser = clap::value_parser!(u64).range(0..=500))]
    pub(crate) window: Option<u64>,
    /// End when caught up and nothing has come for so many milliseconds.
    #[arg(long, value_name = "MS")]
    pub(crate) until_idle: Option<u64>,
    /// End after so many records.
    #[arg(long, value_name = "N")]
    pub(crate) max: Option<u64>,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// A start position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    Earliest,
    Latest,
    Seq(u64),
}

impl std::str::FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "earliest" => Ok(Self::Earliest),
            "latest" => Ok(Self::Latest),
            seq => seq.parse().map(Self::Seq).map_err(|_| "not earliest, latest or a seq".into()),
        }
    }
}

/// Create, configure, list, show, close, trim and delete sessions.
#[derive(Debug, ClapArgs)]
pub(crate) struct Session {
    #[command(subcommand)]
    pub(crate) action: SessionAction,
    /// Print JSON lines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Connection file of the server. [default: the one that `serve --dev` wrote on this machine]
    #[arg(long, value_name = "FILE", env = "MAINSTAY_CONNECT", global = true)]
    pub(crate) connect: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SessionAction {
    /// Create a session; fails if it exists.
    Create {
        /// Its name.
        session: String,
        /// Delete it once it was neither attached nor appended to for so many seconds. [default: never]
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
        expire_after: Option<u64>,
    },
    /// Say how a session treats runs and inputs. It is made if it does not exist.
    Configure {
        /// Its name.
        session: String,
        /// How many runs may be active.
        #[arg(long, value_enum, default_value = "single")]
        runs: RunMode,
        /// What becomes of an input that comes while a run is active.
        #[arg(long, value_enum, default_value = "enqueue")]
        inputs: InputPolicy,
    },
    /// List the sessions that the token lets you read.
    Ls {
        /// Only sessions whose name starts so.
        #[arg(default_value = "")]
        prefix: String,
    },
    /// Show what a session holds.
    Show {
        /// Its name.
        session: String,
    },
    /// Close a session: it can be read, and nothing can follow.
    Close {
        /// Its name.
        session: String,
    },
    /// Release old records; readers are told of the gap.
    Trim {
        /// Its name.
        session: String,
        /// Release the records below this seq.
        #[arg(long, value_name = "SEQ")]
        before: u64,
    },
    /// Delete a session with everything in it.
    Delete {
        /// Its name.
        session: String,
    },
}

/// Make capability tokens; read and revoke tokens of any kind.
#[derive(Debug, ClapArgs)]
pub(crate) struct Token {
    #[command(subcommand)]
    pub(crate) action: TokenAction,
    /// Print JSON lines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenAction {
    /// Make a signing key. Prints the verification key for the server's configuration.
    Keygen {
        /// File for the signing key; it is a secret.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Make a token.
    Mint {
        /// Who holds it; authors of records carry it.
        #[arg(long, value_name = "NAME")]
        subject: String,
        /// What it allows: PREFIX=OPERATIONS, for example agent:=read,append. Operations are read, append, create, manage, join,
        /// run, signal, signal-own (about what they asked for or hold), notify, mint and all. An empty prefix is every
        /// session. May be repeated.
        #[arg(long, value_name = "PREFIX=OPS", required = true)]
        grant: Vec<String>,
        /// Seconds until it expires.
        #[arg(long, value_name = "SECS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..))]
        ttl: u32,
        /// Bind it to one client instance (32 hexadecimal digits).
        #[arg(long, value_name = "ID")]
        device: Option<String>,
        /// Bind it to the client certificate in this PEM file: it is good only for who has the key.
        #[arg(long, value_name = "FILE")]
        certificate: Option<PathBuf>,
        /// A name by which it can be revoked. [default: a hash of it]
        #[arg(long, value_name = "ID")]
        id: Option<String>,
        /// Signing key file. [default: the one of `serve --dev` on this machine]
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
    },
    /// Have the server make a narrower token out of the one in the connection file, for a sub-agent or a tool. Prints it, or a connection
    /// file with it.
    Delegate {
        /// Who holds it, below the subject of the one that it is made from: `tool` of `alice` is `alice/tool`.
        name: String,
        /// What it allows, as for `mint`: nothing that the other one does not, and only where that grants `mint`. May be repeated.
        #[arg(long, value_name = "PREFIX=OPS", required = true)]
        grant: Vec<String>,
        /// Seconds until it expires, and never later than the other one.
        #[arg(long, value_name = "SECS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..))]
        ttl: u32,
        /// Bind it to one client instance (32 hexadecimal digits).
        #[arg(long, value_name = "ID")]
        device: Option<String>,
        /// Write a connection file with it.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        connect: Connect,
    },
    /// Believe a token, a subject's tokens or a key no more. Acts at once on the server that serves the data directory, on connections that
    /// exist too; where none does, from the next start on.
    #[command(group = clap::ArgGroup::new("what").required(true))]
    Revoke {
        /// The token, or - to read it from standard input; what was made from it is revoked with it.
        #[arg(group = "what")]
        token: Option<String>,
        /// The id of a token, as `inspect` prints it.
        #[arg(long, value_name = "ID", group = "what")]
        id: Option<String>,
        /// Every token of this subject, and of those below it, that was issued until now.
        #[arg(long, value_name = "NAME", group = "what")]
        subject: Option<String>,
        /// Every token that this key signed, by its id as `inspect` prints it: k4.pid.…, or an identity provider and its name there.
        #[arg(long, value_name = "ID", group = "what")]
        key: Option<String>,
        /// The namespace.
        #[arg(long, value_name = "NAME", default_value = DEFAULT_NAMESPACE)]
        namespace: String,
        /// Data directory of the server.
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
    },
    /// Print what a token says, without verifying it.
    Inspect {
        /// The token, or - to read it from standard input.
        token: String,
    },
}

/// Say in words what is wrong with a server, its configuration or the way to it, and what to do.
///
/// Looks at everything between a client and what it wants: the configuration, the data directory, keys and certificates, the disk, the system's
/// buffers, the server that runs, the way to it, the token. Each line says what is wrong, and what to do.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = "Exit codes: 0 nothing is wrong, though there may be warnings; 1 something is.")]
pub(crate) struct Doctor {
    /// Configuration file of the server.
    #[arg(long, value_name = "FILE", env = "MAINSTAY_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Data directory of the server.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) connect: Connect,
    /// Print JSON lines: one for each thing that was looked at.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show what the server of this machine is doing: sessions, connections, and who is slow and why.
///
/// Asks the server that serves the data directory what it is doing, again and again, and shows it: load, memory, the sessions that are
/// followed most, and the connections that lag most, each with what it waits for.
#[derive(Debug, ClapArgs)]
pub(crate) struct Top {
    /// Data directory of the server.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECS", value_parser = seconds, default_value = "2")]
    pub(crate) every: f64,
    /// Look once.
    #[arg(long)]
    pub(crate) once: bool,
    /// Sessions and connections to show.
    #[arg(long, value_name = "N", default_value_t = 15)]
    pub(crate) rows: usize,
    /// Print one JSON line for each look.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Check what a server has stored, offline or by asking it.
///
/// Checks everything that a server has stored in a data directory: journals, checksums, links, chain, views, and that no row is
/// missing. Changes nothing; works on a copy of what is not linked, beside the store, and takes it away. Names session and seq
/// of the first damage and exits with 5. The keys in the directory are checked by `serve`.
///
/// With --online it asks the server that runs: reads every session from the beginning, folds it, and compares what comes of that
/// with what the server says. The token has to grant `read`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Verify {
    /// Data directory of a stopped server.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Print every record as a JSON line, and behind those of each session where it begins and ends.
    #[arg(long)]
    pub(crate) dump: bool,
    /// Ask the server that runs.
    #[arg(long, conflicts_with_all = ["data", "dump"])]
    pub(crate) online: bool,
    /// Only sessions whose names begin so.
    #[arg(long, value_name = "PREFIX", requires = "online", default_value = "")]
    pub(crate) prefix: String,
    /// Connection file of the server. [default: the one that `serve --dev` wrote on this machine]
    #[arg(long, value_name = "FILE", env = "MAINSTAY_CONNECT")]
    pub(crate) connect: Option<PathBuf>,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Save everything that a server stores, while it serves.
///
/// Saves all sessions of a data directory as they are at one moment. The server that serves it does that while it goes on; where none does,
/// this command opens the store itself. The file is in its place once it is whole, also where there was another one.
///
/// What is not saved: the keys in DIR/keys. Keep a copy of them apart: without them, tokens of before are as good as those of a stranger.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = "\
Look at it with `mainstay restore --check FILE`. It does not depend on the version or the engine that wrote it. Where no server runs, a
store of an older format is brought to the one in force first, as by `serve`.

Exit codes: 0 saved; 5 saved, but some sessions are damaged and are not in it, or nothing is saved because the store failed; 2 wrong
arguments; 1 anything else.")]
pub(crate) struct Backup {
    /// File to write.
    pub(crate) file: PathBuf,
    /// Data directory of the server. [default: the one of `serve`]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Namespace of the server.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAMESPACE)]
    pub(crate) namespace: String,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Bring sessions back from a backup, while the server serves.
///
/// Brings sessions back from a backup: each whole or not at all, under its name, if that is free. The server that serves the data directory
/// does that while it goes on; where none does, this command opens the store itself, and makes one if there is none.
///
/// A session that comes back is another life of its name: clients may have seen more of the one before than the backup has. Their cursors,
/// resume tokens and outboxes are told so, and begin anew.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = "\
The whole file is looked at before anything is taken from it.

Exit codes: 0 done; 3 a session named with --session is not in the backup, or its name is taken; 5 the backup is cut short or damaged, or
some of its sessions are not whole; 2 wrong arguments; 1 anything else.")]
pub(crate) struct Restore {
    /// Backup to read.
    pub(crate) file: PathBuf,
    /// Data directory of the server. [default: the one of `serve`]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Namespace of the server.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAMESPACE)]
    pub(crate) namespace: String,
    /// This session alone; may be given several times. [default: all of them]
    #[arg(long = "session", value_name = "NAME")]
    pub(crate) sessions: Vec<String>,
    /// Only look whether the backup is whole.
    #[arg(long, conflicts_with_all = ["data", "sessions"])]
    pub(crate) check: bool,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Measure a server.
///
/// Loads a server and prints figures beside yardsticks of the machine. Starts a server of its own unless --connect names one.
/// Run it from a release build.
#[derive(Debug, ClapArgs)]
pub(crate) struct Bench {
    /// What to measure; `all` is the whole table.
    #[arg(value_enum)]
    pub(crate) scenario: Scenario,
    /// Connections (append, idle). `live` has two for each session, `fanout` one for each follower.
    #[arg(long, value_name = "C", value_parser = positive)]
    pub(crate) connections: Option<usize>,
    /// Sessions, spread over the connections. [default: one for each connection]
    #[arg(long, value_name = "S", value_parser = positive)]
    pub(crate) sessions: Option<usize>,
    /// Records in flight for each session (append without --rate). [default: 16]
    #[arg(long, value_name = "W", conflicts_with = "rate", value_parser = positive)]
    pub(crate) window: Option<usize>,
    /// Bytes of a record.
    #[arg(long, value_name = "B", default_value_t = 100)]
    pub(crate) bytes: usize,
    /// Records a second for each session: an open loop, measured from when each record was due.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) rate: Option<u64>,
    /// Followers.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = positive)]
    pub(crate) subscribers: usize,
    /// Records to write before a replay.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) records: u64,
    /// Round-trip time to emulate, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 50)]
    pub(crate) rtt: u64,
    /// How long load lasts, in seconds.
    #[arg(long, value_name = "T", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) secs: u64,
    /// How often everything is repeated.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) runs: u32,
    /// Measure the server of this connection file instead of one that is started. `idle`, `reconnect` and `compact` need their own.
    #[arg(long, value_name = "FILE")]
    pub(crate) connect: Option<PathBuf>,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `bench` measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scenario {
    /// Durable appends in a closed loop.
    Append,
    /// Latency at a modest rate.
    Live,
    /// One session, many followers.
    Fanout,
    /// A long session from its beginning.
    Replay,
    /// Idle connections and cold sessions.
    Idle,
    /// Connect, attach, first record over a long path.
    Reconnect,
    /// A start over a gibibyte, after a kill.
    Start,
    /// What compaction costs others.
    Compact,
    /// The whole table.
    All,
}

/// Print a completion script for a shell.
#[derive(Debug, ClapArgs)]
pub(crate) struct Completions {
    /// The shell.
    pub(crate) shell: Shell,
}

/// Write the manual pages.
#[derive(Debug, ClapArgs)]
pub(crate) struct Man {
    /// Directory for the pages.
    pub(crate) dir: PathBuf,
}

/// A count of at least one.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(count) => Ok(count),
        Err(error) => Err(format!("not a count: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use clap::Parser;
    use clap::error::ErrorKind;

    use super::*;

    fn pages(dir: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir).expect("the documentation").map(|entry| entry.expect("an entry").path()) {
            match entry.is_dir() {
                true => found.extend(pages(&entry)),
                false if entry.extension().is_some_and(|extension| extension == "md") => found.push(entry),
                false => {}
            }
        }
        found
    }

    /// Commands within sentences are not run by a test: what they name has to be there.
    #[test]
    fn every_command_that_the_documentation_names_can_be_given() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut all = pages(&root.join("docs").join("src"));
        all.extend(["README.md", "SECURITY.md", "ARCHITECTURE.md"].map(|name| root.join(name)));
        let mut seen = 0;
        for page in all {
            let text = std::fs::read_to_string(&page).expect("a page");
            for command in text.split('`').skip(1).step_by(2).filter(|span| span.starts_with("mainstay ")) {
                let command = command.replace("\\|", "|");
                // Up to what stands for more of it, and without a shell's words.
                let ends = |word: &&str| !matches!(*word, "…" | "..." | "|" | ">" | "&");
                let words: Vec<&str> = command.split_whitespace().take_while(ends).collect();
                // One of several words: each of them.
                let choices = words.iter().map(|word| word.split('|').count()).max().unwrap_or(1);
                for choice in 0..choices {
                    let chosen = words.iter().map(|word| word.split('|').nth(choice).or(word.split('|').next()));
                    if let Err(error) = Args::try_parse_from(chosen.flatten()) {
                        let wrong = matches!(error.kind(), ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand);
                        assert!(!wrong, "{}: `{command}`: {error}", page.display());
                    }
                    seen += 1;
                }
            }
        }
        assert!(seen > 20, "{seen} commands");
    }
}
