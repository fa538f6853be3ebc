//! `demo`: the whole story on this machine, with real processes, verified at the end.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::Notify;

use crate::args;
use crate::failure::Failure;
use crate::output::Output;

const TEXT: &str = include_str!("demo.txt");
const SESSION: &str = "agent:demo";
/// What the agent's tool found, as its state value.
const TOOL_RESULT: &str = "\"read\"";
/// Nothing in the demo takes longer than this on a working machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn run(_args: args::Demo, output: Output) -> Result<(), Failure> {
    match tokio::time::timeout(3 * PATIENCE, story(output)).await {
        Ok(result) => result,
        Err(_) => Err(Failure::failed("TIMEOUT", "the demo did not come to its end in time")),
    }
}

struct Stage {
    program: PathBuf,
    data: PathBuf,
    output: Output,
    begun: Instant,
}

/// A server process.
struct Server {
    child: Child,
    addr: String,
}

impl Stage {
    fn tell(&self, step: &str, text: &str) -> Result<(), Failure> {
        let at = self.begun.elapsed().as_millis();
        self.output.event(&json!({"event": "step", "step": step, "ms": at, "message": text}), || {
            format!("{:>6.2} s  {text}", self.begun.elapsed().as_secs_f64())
        })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .env("MAINSTAY_CONNECT", self.data.join("connect.json"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn server(&self, listen: &str) -> Result<Server, Failure> {
        let data = self.data.to_string_lossy();
        let mut child = spawn(&mut self.command(&["serve", "--dev", "--data", &data, "--listen", listen, "--json"]))?;
        let mut lines = lines(&mut child)?;
        let event = next_event(&mut lines, "listening").await?;
        let addr = event["addr"].as_str().unwrap_or_default().to_owned();
        // The server says nothing more; its output must not fill up.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Server { child, addr })
    }

    /// A tab that shows the conversation.
    fn tab(&self) -> Result<Tab, Failure> {
        let mut child = spawn(&mut self.command(&["tail", SESSION, "--fold", "--json"]))?;
        let mut lines = lines(&mut child)?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (noting, changed) = (seen.clone(), Arc::new(Notify::new()));
        let changes = changed.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Ok(event) = serde_json::from_str(&line) {
                    noting.lock().unwrap_or_else(PoisonError::into_inner).note(&event);
                    changes.notify_one();
                }
            }
        });
        Ok(Tab { child, seen, changed })
    }

    /// `mainstay run` of the demo's agent, which says a word after each pause of so many milliseconds.
    fn agent(&self, options: &[&str], pause: u32) -> Result<Child, Failure> {
        let program = self.program.to_string_lossy();
        let pause = pause.to_string();
        let run = ["run", SESSION, "--events", "--as", "agent", "--lease", "2", "--json"];
        let agent = ["--", &program, "demo-agent", &pause];
        spawn(&mut self.command(&[&run, options, &agent].concat()))
    }

    /// The JSON lines of a command that ends.
    async fn ask(&self, args: &[&str]) -> Result<Vec<Value>, Failure> {
        let output = self.command(args).output().await.map_err(|error| Failure::io("a process of the demo", &error))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }
}

/// What a tab has shown.
#[derive(Debug, Default, Clone)]
struct Seen {
    /// Text and status of each message, by id.
    messages: BTreeMap<String, (String, String)>,
    /// The view hash that it began with.
    hash: Option<String>,
}

impl Seen {
    fn note(&mut self, event: &Value) {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let id = text("id");
        match event["event"].as_str() {
            Some("view") => self.hash = Some(text("hash")),
            Some("message") => drop(self.messages.insert(id, (text("text"), text("status")))),
            Some("append") => self.messages.entry(id).or_default().0.push_str(&text("text")),
            Some("end") => self.messages.entry(id).or_default().1 = text("status"),
            Some("reopened") => self.messages.entry(id).or_default().1 = "open".to_owned(),
            _ => {}
        }
    }

    /// The longest text among messages of this status: the answers are longer than all else.
    fn answer(&self, status: &str) -> String {
        let of = self.messages.values().filter(|(_, known)| known == status);
        of.map(|(text, _)| text.clone()).max_by_key(String::len).unwrap_or_default()
    }
}

/// A tab process.
struct Tab {
    child: Child,
    seen: Arc<Mutex<Seen>>,
    changed: Arc<Notify>,
}

impl Tab {
    fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it has shown what is wanted.
    async fn shows(&self, what: &str, wanted: impl Fn(&Seen) -> bool) -> Result<Seen, Failure> {
        let wait = async {
            loop {
                let seen = self.seen();
                if wanted(&seen) {
                    return seen;
                }
                self.changed.notified().await;
            }
        };
        let late = |_| Failure::failed("TIMEOUT", format!("a tab of the demo did not show {what} in time"));
        tokio::time::timeout(PATIENCE, wait).await.map_err(late)
    }
}

fn spawn(command: &mut Command) -> Result<Child, Failure> {
    command.spawn().map_err(|error| Failure::io("cannot start a process of the demo", &error))
}

fn lines(child: &mut Child) -> Result<Lines<BufReader<ChildStdout>>, Failure> {
    let stdout = child.stdout.take().ok_or_else(|| Failure::failed("INTERNAL", "a process has no output"))?;
    Ok(BufReader::new(stdout).lines())
}

/// The next event of this name; others are passed over.
async fn next_event(lines: &mut Lines<BufReader<ChildStdout>>, name: &str) -> Result<Value, Failure> {
    let wait = async {
        while let Ok(Some(line)) = lines.next_line().await {
            let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
            if event["event"] == name {
                return Ok(event);
            }
            if event["event"] == "error" {
                let message = event["message"].as_str().unwrap_or_default();
                return Err(Failure::failed("DEMO", format!("a process of the demo failed: {message}")));
            }
        }
        Err(Failure::failed("DEMO", format!("a process of the demo ended before it said {name}")))
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| {
        Err(Failure::failed("TIMEOUT", format!("a process of the demo did not say {name} in time")))
    })
}

async fn kill(child: &mut Child) -> Result<(), Failure> {
    // SIGKILL: the process gets no chance to put anything in order.
    child.kill().await.map_err(|error| Failure::io("cannot kill a process of the demo", &error))
}

async fn story(output: Output) -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::io("this program", &error))?;
    let dir = tempfile::tempdir().map_err(|error| Failure::io("a temporary directory", &error))?;
    let stage = Stage { program, data: dir.path().to_owned(), output, begun: Instant::now() };
    let mut checks = Checks { output, held: true };

    let mut server = stage.server("127.0.0.1:0").await?;
    stage.tell("server", &format!("a server listens on {}; its data is in {}", server.addr, dir.path().display()))?;

    let mut one = stage.tab()?;
    let mut agent = stage.agent(&[], 6)?;
    let mut said = lines(&mut agent)?;
    let run = next_event(&mut said, "run").await?;
    stage.tell(
        "agent",
        "an agent has announced its presence and holds a run; it calls a tool, then answers word by word",
    )?;

    let third = TEXT.len() / 3;
    one.shows("the first third", |seen| seen.answer("open").len() > third / 2).await?;
    kill(&mut one.child).await?;
    let left = one.seen().answer("open").len();
    stage.tell("kill_tab", &format!("tab one is killed with SIGKILL after {left} bytes of the answer"))?;

    let mut two = stage.tab()?;
    let seen = two.shows("the answer so far", |seen| !seen.answer("open").is_empty()).await?;
    let here = seen.answer("open");
    stage.tell(
        "tab_two",
        &format!("tab two opens and has the partial answer at once: {} bytes, one message", here.len()),
    )?;
    checks.hold(
        "tab two began with every byte that tab one had, in place",
        here.len() >= left && TEXT.starts_with(&here),
    )?;
    let value = stage.ask(&["state", "get", SESSION, "tool/1", "--json"]).await?;
    checks.hold(
        "it has the result of the tool, from the shared state",
        value.iter().any(|row| row["value"] == TOOL_RESULT),
    )?;
    let members = stage.ask(&["presence", SESSION, "--json"]).await?;
    let streams = |row: &Value| row["name"] == "agent" && row["status"] == "streaming";
    checks.hold("it sees what the agent is doing", members.iter().any(streams))?;

    kill(&mut server.child).await?;
    stage.tell("kill_server", "the server is killed with SIGKILL; the agent goes on and keeps what it says")?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut server = stage.server(&server.addr).await?;
    stage.tell("restart_server", "the server is back on the same data; agent and tab two return by themselves")?;
    two.shows("more of the answer", |seen| seen.answer("open").len() > here.len() + third / 4).await?;

    let signal = stage.ask(&["signal", SESSION, "interrupt", "--text", "once more", "--wait", "--json"]).await?;
    let consumed = signal.iter().any(|row| row["event"] == "outcome" && row["outcome"] == "consumed");
    let seen = two.shows("the end of the answer", |seen| !seen.answer("interrupted").is_empty()).await?;
    let partial = seen.answer("interrupted");
    ended(&mut agent).await?;
    stage.tell("interrupt", &format!("tab two interrupts the agent after {} bytes", partial.len()))?;
    checks.hold("the interrupt was accepted and consumed, for all to see", consumed)?;
    checks.hold("what was interrupted is a prefix of what the agent had to say", TEXT.starts_with(&partial))?;

    let mut agent = stage.agent(&[], 3)?;
    let mut said = lines(&mut agent)?;
    next_event(&mut said, "run").await?;
    let mut standby = stage.agent(&["--standby"], 3)?;
    let mut standing = lines(&mut standby)?;
    next_event(&mut standing, "standby").await?;
    stage.tell("standby", "the agent answers once more, and another one stands by")?;
    two.shows("a third of the answer", |seen| seen.answer("open").len() > third).await?;
    kill(&mut agent).await?;
    let killed = Instant::now();
    stage.tell("kill_agent", "the agent is killed with SIGKILL")?;
    let taken = next_event(&mut standing, "run").await?;
    stage.tell(
        "takeover",
        &format!(
            "{:.1} s later the run is lost, and the standby has taken it over at byte {} of the answer",
            killed.elapsed().as_secs_f64(),
            taken["offset"]
        ),
    )?;
    let seen = two.shows("the whole answer", |seen| seen.answer("complete").len() >= TEXT.len()).await?;
    ended(&mut standby).await?;
    checks.hold("two agents said the whole answer, each byte once", seen.answer("complete") == TEXT)?;
    checks.hold("the run that was taken over is another one than the first", taken["run"] != run["run"])?;

    // The agent that was killed counts as here until its grace is over.
    while stage.ask(&["presence", SESSION, "--json"]).await?.iter().any(|row| row["event"] == "member") {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let again = stage.tab()?;
    let other = again.shows("everything", |other| other.messages == seen.messages).await;
    checks.hold("a tab that is opened now has the same as the one that was there", other.is_ok())?;
    let info = stage.ask(&["session", "show", SESSION, "--json"]).await?;
    let hash = info.first().map(|info| info["view_hash"].clone());
    let shown = again.seen().hash.map(Value::from);
    checks.hold("their view is the server's: one hash", hash.is_some() && hash == shown)?;
    for tab in [&mut two, &mut { again }] {
        kill(&mut tab.child).await?;
    }
    kill(&mut server.child).await?;
    let verified = stage.ask(&["verify", "--data", &stage.data.to_string_lossy(), "--json"]).await?;
    let sound = verified.iter().any(|row| row["event"] == "session" && Some(&row["view_hash"]) == hash.as_ref());
    checks.hold("the data directory verifies offline, with the same hash", sound)?;
    if !checks.held {
        return Err(Failure::integrity("the demo found that a promise does not hold"));
    }
    stage.tell("done", "everything held")
}

/// What has to hold.
struct Checks {
    output: Output,
    held: bool,
}

impl Checks {
    fn hold(&mut self, what: &str, ok: bool) -> Result<(), Failure> {
        self.held &= ok;
        let word = if ok { "holds" } else { "DOES NOT HOLD" };
        self.output.event(&json!({"event": "check", "check": what, "ok": ok}), || format!("   check  {what}: {word}"))
    }
}

async fn ended(child: &mut Child) -> Result<(), Failure> {
    let wait = tokio::time::timeout(PATIENCE, child.wait()).await;
    let late = |_| Failure::failed("TIMEOUT", "an agent of the demo did not end in time");
    wait.map_err(late)?.map(drop).map_err(|error| Failure::io("an agent of the demo", &error))
}

/// The agent of the demo: says what it does as events, one a line, and goes on where another one stopped.
pub(crate) async fn agent(args: args::DemoAgent) -> Result<(), Failure> {
    let say = |event: Value| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{event}").and_then(|()| out.flush()).map_err(|error| Failure::io("standard output", &error))
    };
    let offset: Option<usize> = std::env::var("MAINSTAY_OFFSET").ok().and_then(|offset| offset.parse().ok());
    if offset.is_none() {
        say(json!({"type": "TOOL_CALL_START", "toolCallId": "1", "toolCallName": "read_text"}))?;
        say(json!({"type": "TOOL_CALL_ARGS", "toolCallId": "1", "delta": "{\"of\":\"demo\"}"}))?;
        say(json!({"type": "TOOL_CALL_END", "toolCallId": "1"}))?;
        say(json!({"type": "CUSTOM", "name": "state.put", "value": {"key": "tool/1", "value": "read"}}))?;
        say(json!({"type": "TOOL_CALL_RESULT", "toolCallId": "1", "content": "read"}))?;
        say(json!({"type": "TEXT_MESSAGE_START", "messageId": "answer"}))?;
    }
    for word in TEXT.get(offset.unwrap_or(0)..).unwrap_or_default().split_inclusive(' ') {
        say(json!({"type": "TEXT_MESSAGE_CONTENT", "messageId": "answer", "delta": word}))?;
        tokio::time::sleep(Duration::from_millis(args.pause)).await;
    }
    say(json!({"type": "TEXT_MESSAGE_END", "messageId": "answer"}))
}
