//! Real processes: a server that can be killed, and client commands.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use mainstay_client::{Client, Config, ConnectFile};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::mpsc;

use crate::proxy::{Proxy, before};

static BINARY: OnceLock<PathBuf> = OnceLock::new();

/// Makes `path` the `mainstay` binary of this process; the first call counts.
pub fn use_binary(path: PathBuf) {
    BINARY.get_or_init(|| path);
}

/// The `mainstay` binary: that of [`use_binary`], `MAINSTAY_BIN`, this process if it is one, or the one beside the test binary.
///
/// # Panics
///
/// If there is none; `cargo xtask test` builds it.
pub fn binary() -> PathBuf {
    if let Some(path) = BINARY.get() {
        return path.clone();
    }
    if let Some(path) = std::env::var_os("MAINSTAY_BIN") {
        return path.into();
    }
    let this = std::env::current_exe().expect("the path of this program");
    if this.file_name().is_some_and(|name| name == "mainstay") {
        return this;
    }
    // Beside it, or beside the directory of test binaries.
    let places = this.ancestors().skip(1).take(2).map(|dir| dir.join("mainstay"));
    let path = places.clone().find(|path| path.exists());
    path.unwrap_or_else(|| {
        let missing: Vec<_> = places.map(|path| path.display().to_string()).collect();
        panic!("{} is missing; run `cargo build -p mainstay` or `cargo xtask test`", missing.join(" or "))
    })
}

/// Nothing in a test takes longer than this.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a process has used, by the kernel's account.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// CPU time since it began.
    pub cpu: Duration,
    /// Bytes that are resident.
    pub resident: u64,
    /// Of them, those that no file backs.
    pub anonymous: u64,
    /// Bytes that were resident at most.
    pub peak: u64,
}

impl Usage {
    /// That of a process, or `None` if there is none of this id.
    pub fn of(pid: u32) -> Option<Self> {
        // Clock ticks of process accounting: 100 a second on every Linux that matters.
        const TICKS: f64 = 100.0;
        let (stat, status) = (proc_file(pid, "stat")?, proc_file(pid, "status")?);
        // The name in parentheses may hold spaces.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
        let bytes = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
        };
        Some(Self {
            cpu: Duration::from_secs_f64(ticks / TICKS),
            resident: bytes("VmRSS:")?,
            anonymous: bytes("RssAnon:")?,
            peak: bytes("VmHWM:")?,
        })
    }
}

fn proc_file(pid: u32, name: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok()
}

/// A `mainstay serve --dev` process on a data directory of its own.
#[derive(Debug)]
pub struct Server {
    dir: PathBuf,
    addr: SocketAddr,
    /// Where it listens to its operator, if it does.
    admin: Option<String>,
    child: Option<Child>,
    /// What clients reach it through, if not directly.
    network: Option<Proxy>,
    /// What it says after it listens.
    said: Option<mpsc::Receiver<Value>>,
    extra: Vec<String>,
    /// What the next process runs under.
    under: Vec<String>,
    /// Where what processes say to people goes, if not to this one's standard error.
    log: Option<PathBuf>,
    /// Goes after the process.
    _temp: Option<TempDir>,
}

/// The status and the body of a page of an admin listener.
///
/// # Panics
///
/// If there is no answer in time.
pub async fn look_at(admin: &str, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
    let answer = async {
        let mut stream = TcpStream::connect(admin).await.expect("the admin listener");
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("an answer");
        text
    };
    let text = tokio::time::timeout(PATIENCE, answer).await.expect("an answer in time");
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, text.split_once("\r\n\r\n").expect("a body").1.to_owned())
}

impl Server {
    /// Starts a server on a new data directory and a free port.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same with more arguments.
    pub async fn start_with(extra: &[&str]) -> Self {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let dir = temp.path().to_owned();
        Self { _temp: Some(temp), ..Self::start_in(&dir, extra).await }
    }

    /// Starts a server on `dir` with more arguments.
    pub async fn start_in(dir: &Path, extra: &[&str]) -> Self {
        let extra = extra.iter().map(|text| (*text).to_owned()).collect();
        let any = ([127, 0, 0, 1], 0).into();
        let mut this = Self {
            dir: dir.to_owned(),
            admin: None,
            _temp: None,
            addr: any,
            child: None,
            network: None,
            said: None,
            extra,
            under: Vec::new(),
            log: None,
        };
        this.restart().await;
        this
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The status and the body of a page of its admin listener.
    ///
    /// # Panics
    ///
    /// If it has none, or gives no answer.
    pub async fn look_at(&self, path: &str) -> (u16, String) {
        look_at(self.admin.as_deref().expect("a server that was started with --admin"), path).await
    }

    /// Its data directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The connection file of clients: its own, or that of the bad network before it (see [`NETWORK`](crate::proxy::NETWORK)).
    pub fn connect_file(&self) -> PathBuf {
        self.dir.join(if self.network.is_some() { "through-network.json" } else { "connect.json" })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().and_then(Child::id).expect("a running server")
    }

    /// What its process has used.
    ///
    /// # Panics
    ///
    /// If it does not run.
    pub fn usage(&self) -> Usage {
        Usage::of(self.pid()).expect("the usage of a running process")
    }

    /// Stops all that it does, until it is killed.
    pub async fn freeze(&self) {
        let pid = self.pid();
        let stopped = Command::new("kill").args(["-STOP", &pid.to_string()]).status().await.expect("kill");
        assert!(stopped.success());
        crate::until("it is stopped", async || {
            let stat = proc_file(pid, "stat").expect("a process that nobody has waited for");
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 'Z']))
        })
        .await;
    }

    /// True if it has a file in this directory open.
    ///
    /// # Panics
    ///
    /// If it does not run, or there is no such directory.
    pub fn has_open(&self, dir: &Path) -> bool {
        let dir = dir.canonicalize().expect("a directory");
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the files of a running process");
        // One that is closed meanwhile is not open.
        files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok()).any(|file| file.starts_with(&dir))
    }

    /// Kills it with SIGKILL.
    pub async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.expect("kill the server");
        }
    }

    /// Starts it again on the same data and address, if it does not run.
    pub async fn restart(&mut self) {
        match self.try_restart().await {
            Ok(()) => self.join_network(),
            Err((code, said)) => panic!("the server did not start, exit code {code:?}: {said}"),
        }
    }

    /// Puts the bad network before it, once, if the environment asks for it.
    fn join_network(&mut self) {
        if self.network.is_none()
            && let Some(proxy) = before(self.addr)
        {
            self.connect_file_at(proxy.addr(), "through-network.json");
            self.network = Some(proxy);
        }
    }

    /// The next process that is started runs under this command, which starts it as itself, as `strace -D` does.
    pub fn run_under(&mut self, command: Vec<String>) {
        self.under = command;
    }

    /// What processes that are started from now on say to people goes to the end of this file.
    pub fn log_to(&mut self, path: PathBuf) {
        self.log = Some(path);
    }

    /// As [`Server::restart`]; tells the exit code and output of a server that refuses to start.
    pub async fn try_restart(&mut self) -> Result<(), (Option<i32>, String)> {
        if self.child.is_some() {
            return Ok(());
        }
        let listen = self.addr.to_string();
        self.begin(&["--listen", &listen]).await
    }

    /// As [`Server::try_restart`]; one that does not listen after so long is frozen in its start, and that is `None`.
    pub async fn restart_within(&mut self, time: Duration) -> Option<Result<(), (Option<i32>, String)>> {
        let listen = self.addr.to_string();
        let mut lines = self.spawn(&["--listen", &listen]);
        let mut said = String::new();
        let begun = tokio::time::timeout(time, self.listening(&mut lines, &mut said)).await;
        match begun {
            Ok(Ok(())) => self.hear(lines),
            Ok(Err(_)) => {}
            Err(_) => {
                self.freeze().await;
                let status = self.has_ended()?;
                while let Ok(Some(line)) = lines.next_line().await {
                    said.push_str(&line);
                }
                return Some(Err((status.code(), said)));
            }
        }
        begun.ok()
    }

    /// Starts another process that takes the place of the one that runs, at the same address or at `elsewhere`. Waits until the one before
    /// has ended, and returns its exit code and how long it took to end.
    ///
    /// # Panics
    ///
    /// If the next one does not start.
    pub async fn succeed(&mut self, elsewhere: bool) -> (Option<i32>, Duration) {
        let mut before = self.child.take().expect("a running server");
        let begun = tokio::time::Instant::now();
        let args: &[&str] = if elsewhere { &["--takeover", "--listen", "127.0.0.1:0"] } else { &["--takeover"] };
        let listen = self.addr.to_string();
        let args = if elsewhere { args.to_vec() } else { [args, &["--listen", &listen]].concat() };
        let ended = async {
            let status = tokio::time::timeout(PATIENCE, before.wait()).await.expect("the server ends in time");
            (status.expect("an exit status").code(), begun.elapsed())
        };
        let (begun, ended) = tokio::join!(self.begin(&args), ended);
        if let Err((code, said)) = begun {
            panic!("the next server did not start, exit code {code:?}: {said}");
        }
        ended
    }

    async fn begin(&mut self, args: &[&str]) -> Result<(), (Option<i32>, String)> {
        let mut lines = self.spawn(args);
        self.listening(&mut lines, &mut String::new()).await?;
        self.hear(lines);
        Ok(())
    }

    /// Starts a process and returns what it says.
    fn spawn(&mut self, args: &[&str]) -> Lines<BufReader<ChildStdout>> {
        let mut under = std::mem::take(&mut self.under).into_iter();
        let mut command = match under.next() {
            Some(program) => {
                let mut command = Command::new(program);
                command.args(under).arg(binary());
                command
            }
            None => Command::new(binary()),
        };
        if let Some(log) = &self.log {
            let log = std::fs::OpenOptions::new().append(true).create(true).open(log);
            command.stderr(log.expect("a log"));
        }
        let mut child = command
            .args(["serve", "--dev", "--json", "--data"])
            .arg(&self.dir)
            .args(args)
            .args(&self.extra)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("start the server");
        let lines = BufReader::new(child.stdout.take().expect("output")).lines();
        self.child = Some(child);
        lines
    }

    /// Waits until the process that was started listens, or ends. What it says until then is put behind `said`, also by one that is not waited
    /// for.
    async fn listening(
        &mut self,
        lines: &mut Lines<BufReader<ChildStdout>>,
        said: &mut String,
    ) -> Result<(), (Option<i32>, String)> {
        while let Some(line) = lines.next_line().await.expect("output of the server") {
            let event: Value = serde_json::from_str(&line).expect("JSON from the server");
            if event["event"] == "listening" {
                self.addr = event["addr"].as_str().and_then(|addr| addr.parse().ok()).expect("an address");
                self.admin = event["admin"].as_str().map(str::to_owned);
                return Ok(());
            }
            said.push_str(&line);
        }
        let status = self.child.as_mut().expect("it was started").wait().await.expect("the server's exit status");
        self.child = None;
        Err((status.code(), said.clone()))
    }

    /// Reads on what a process says, for whoever asks for it.
    fn hear(&mut self, mut lines: Lines<BufReader<ChildStdout>>) {
        let (tell, said) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                // Full when nobody asked: what comes then interests nobody.
                let _ = serde_json::from_str(&line).map(|event| tell.try_send(event));
            }
        });
        self.said = Some(said);
    }

    /// Bytes that it has allocated, by its own account.
    pub async fn allocated(&mut self) -> u64 {
        let pid = self.pid().to_string();
        let said = self.said.as_mut().expect("a running server");
        while said.try_recv().is_ok() {}
        let asked = Command::new("kill").args(["-USR1", &pid]).status().await.expect("kill");
        assert!(asked.success());
        loop {
            let event =
                tokio::time::timeout(PATIENCE, said.recv()).await.expect("an answer").expect("a running server");
            if event["event"] == "memory" {
                return event["allocated"].as_u64().expect("a number");
            }
        }
    }

    /// How it has ended, if it has. Then it is not the one that runs any more.
    pub fn has_ended(&mut self) -> Option<std::process::ExitStatus> {
        let status = self.child.as_mut()?.try_wait().expect("a status")?;
        self.child = None;
        Some(status)
    }

    /// Waits until it ends by itself and returns its exit code.
    pub async fn ended(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("the server ends in time");
        status.expect("an exit status").code()
    }

    /// Stops it with SIGTERM and returns its exit code.
    pub async fn terminate(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        let pid = child.id().expect("a running server").to_string();
        let killed = Command::new("kill").args(["-TERM", &pid]).status().await.expect("kill");
        assert!(killed.success());
        let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("the server stops in time");
        status.expect("an exit status").code()
    }

    /// A client command against this server.
    pub fn command(&self, args: &[&str]) -> Command {
        command(&self.connect_file(), args)
    }

    /// A client in this process.
    pub fn client(&self, config: Config) -> Client {
        let file = ConnectFile::read(&self.connect_file()).expect("a connection file");
        Client::connect_quic(&file, config).expect("a client")
    }

    /// A connection file for clients that reach the server at `addr`.
    pub fn connect_file_at(&self, addr: SocketAddr, name: &str) -> PathBuf {
        let text = std::fs::read_to_string(self.dir.join("connect.json")).expect("a connection file");
        let mut file: Value = serde_json::from_str(&text).expect("JSON");
        file["addr"] = addr.to_string().into();
        let path = self.dir.join(name);
        std::fs::write(&path, file.to_string()).expect("write a connection file");
        path
    }
}

/// A client command with a connection file.
pub fn command(connect: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(args).env("MAINSTAY_CONNECT", connect).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs a command to its end.
pub async fn run(mut command: Command) -> Output {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output();
    tokio::time::timeout(PATIENCE, output).await.expect("the command ends in time").expect("the command runs")
}

/// The JSON lines of an output.
pub fn events(output: &[u8]) -> Vec<Value> {
    let text = String::from_utf8_lossy(output);
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"))).collect()
}

/// The events of this name.
pub fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == name).collect()
}

/// The JSON lines of a command that runs, as they come.
pub struct Rows(Lines<BufReader<ChildStdout>>);

impl Rows {
    /// Reads this output.
    pub fn of(stdout: ChildStdout) -> Self {
        Self(BufReader::new(stdout).lines())
    }

    /// The next row; `None` at the end. Cancellation-safe.
    ///
    /// # Panics
    ///
    /// If it is no row.
    pub async fn next(&mut self) -> Option<Value> {
        let line = self.0.next_line().await.expect("output")?;
        Some(serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line}")))
    }

    /// The next rows, up to the first event of this name.
    ///
    /// # Panics
    ///
    /// If none comes in time.
    pub async fn until(&mut self, name: &str) -> Vec<Value> {
        let mut rows = Vec::new();
        while rows.last().is_none_or(|row: &Value| row["event"] != name) {
            let line = tokio::time::timeout(PATIENCE, self.0.next_line()).await;
            let line =
                line.unwrap_or_else(|_| panic!("no {name} came, only {rows:?}")).expect("output").expect("a row");
            rows.push(serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line}")));
        }
        rows
    }
}
