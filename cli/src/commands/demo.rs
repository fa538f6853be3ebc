//! `demo`: the whole story on this machine, with real processes, verified at the end.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::args;
use crate::failure::Failure;
use crate::output::Output;

const TEXT: &str = include_str!("demo.txt");
const SESSION: &str = "agent:demo";
/// Pause between two words of the agent.
const WORD: Duration = Duration::from_millis(8);
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

    fn follower(&self, name: &str) -> Result<Child, Failure> {
        let (file, cursor) = (self.file(name), self.data.join(format!("{name}.cursor")));
        let (file, cursor) = (file.to_string_lossy(), cursor.to_string_lossy());
        let args = ["tail", SESSION, "--output", &file, "--cursor-file", &cursor, "--json"];
        spawn(&mut self.command(&args))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.data.join(format!("{name}.jsonl"))
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
    let words: Vec<String> = TEXT.split_inclusive(' ').map(|word| word.trim_end_matches('\n').to_owned()).collect();

    let mut server = stage.server("127.0.0.1:0").await?;
    stage.tell("server", &format!("a server listens on {}; its data is in {}", server.addr, dir.path().display()))?;

    let mut agent = spawn(stage.command(&["append", SESSION, "--producer", "agent", "--json"]).stdin(Stdio::piped()))?;
    let mut acks = lines(&mut agent)?;
    let stdin = agent.stdin.take().ok_or_else(|| Failure::failed("INTERNAL", "the agent has no input"))?;
    let writing = tokio::spawn(stream(stdin, words.clone()));
    let confirmed = tokio::spawn(async move {
        let mut seqs = Vec::new();
        while let Ok(Some(line)) = acks.next_line().await {
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["event"] == "ack" {
                seqs.extend(event["seq"].as_u64());
            }
        }
        seqs
    });
    stage.tell("agent", &format!("an agent process streams {} words into {SESSION}, one record each", words.len()))?;

    let mut laptop = stage.follower("laptop")?;
    let mut phone = stage.follower("phone")?;
    stage.tell("followers", "two clients follow it live: laptop and phone")?;

    let third = words.len() / 3;
    wait_for_rows(&stage.file("phone"), third).await?;
    kill(&mut phone).await?;
    let seen = rows(&stage.file("phone"))?.len();
    stage.tell("kill_client", &format!("the phone is killed with SIGKILL after {seen} words"))?;

    wait_for_rows(&stage.file("laptop"), third + third / 2).await?;
    kill(&mut server.child).await?;
    let seen = rows(&stage.file("laptop"))?.len();
    stage.tell(
        "kill_server",
        &format!("the server is killed with SIGKILL; the laptop has {seen} words, the agent goes on"),
    )?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut server = stage.server(&server.addr).await?;
    stage.tell("restart_server", "the server is back on the same data; agent and laptop return by themselves")?;
    let mut phone = stage.follower("phone")?;
    stage.tell("restart_client", "the phone is back and goes on at its cursor")?;

    let status = agent.wait().await.map_err(|error| Failure::io("the agent", &error))?;
    let joined = |error: tokio::task::JoinError| Failure::failed("INTERNAL", error.to_string());
    writing.await.map_err(joined)?.map_err(|error| Failure::io("the agent's input", &error))?;
    let acked = confirmed.await.map_err(joined)?;
    stage.tell(
        "agent_done",
        &format!("the agent has ended; {} of {} words are acknowledged", acked.len(), words.len()),
    )?;
    for name in ["laptop", "phone"] {
        wait_for_rows(&stage.file(name), words.len()).await?;
    }
    for follower in [&mut laptop, &mut phone] {
        kill(follower).await?;
    }
    kill(&mut server.child).await?;

    let every: Vec<u64> = (0..words.len() as u64).collect();
    let mut held = true;
    let mut check = |what: &str, ok: bool| -> Result<(), Failure> {
        held &= ok;
        let word = if ok { "holds" } else { "DOES NOT HOLD" };
        stage.output.event(&json!({"event": "check", "check": what, "ok": ok}), || format!("   check  {what}: {word}"))
    };
    check("the agent ended well", status.success())?;
    check("every word was acknowledged once, in order", acked == every)?;
    for name in ["laptop", "phone"] {
        let rows = rows(&stage.file(name))?;
        let seqs: Vec<u64> = rows.iter().filter_map(|row| row["seq"].as_u64()).collect();
        let text: String = rows.iter().filter_map(|row| row["data"].as_str()).collect();
        check(&format!("the {name} has every seq once, without a hole"), seqs == every)?;
        check(&format!("the {name} has the whole text once"), text == TEXT.trim_end_matches('\n'))?;
    }
    let verified = stage.command(&["verify", "--data", &stage.data.to_string_lossy()]).output().await;
    let verified = verified.map_err(|error| Failure::io("verify", &error))?;
    check("the data directory verifies offline", verified.status.success())?;
    if !verified.status.success() {
        eprint!("{}", String::from_utf8_lossy(&verified.stdout));
    }
    if !held {
        return Err(Failure::integrity("the demo found that a promise does not hold"));
    }
    stage.tell("done", "everything held")
}

/// Writes words to the agent, one line each.
async fn stream(mut stdin: tokio::process::ChildStdin, words: Vec<String>) -> std::io::Result<()> {
    for word in words {
        stdin.write_all(word.as_bytes()).await?;
        stdin.write_all(b"\n").await?;
        tokio::time::sleep(WORD).await;
    }
    Ok(())
}

/// The whole record rows of a file.
fn rows(path: &Path) -> Result<Vec<Value>, Failure> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Failure::io(path.display(), &error)),
    };
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Waits until a follower has written so many rows.
async fn wait_for_rows(path: &Path, count: usize) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    while rows(path)?.len() < count {
        if Instant::now() >= deadline {
            return Err(Failure::failed("TIMEOUT", format!("{} has too few rows", path.display())));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
