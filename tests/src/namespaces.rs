//! A network of real interfaces: a phone with a Wi-Fi and a mobile network, a router with a NAT, and a server, each in a network namespace.
//!
//! ```text
//! phone                     router                                     server
//! wifi0 10.77.1.2 ──veth── wifi ─▶ fault proxy 20 ms          ─┐
//!                                                               ├─▶ core ─veth── net0 10.77.3.2
//! lte0  10.77.2.2 ──veth── lte  ─▶ fault proxy 60 ms, 1 % loss ─┘
//! plain 10.77.4.2 ──veth── plain ─▶ nftables NAT ──────────────┘
//! ```
//!
//! What goes over `plain` passes the NAT of the kernel alone, which can be made to forget. Needs root, `ip`, `nft` and `conntrack`.

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::process::{PATIENCE, Rows, binary};
use crate::skipped;

/// Where the server is.
pub const SERVER: &str = "10.77.3.2";

/// An interface of the phone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// 20 ms; what is used where there is a choice.
    Wifi,
    /// 60 ms, 1 % loss.
    Lte,
    /// Nothing in between but the NAT.
    Plain,
}

impl Interface {
    const ALL: [Self; 3] = [Self::Wifi, Self::Lte, Self::Plain];

    fn name(self) -> &'static str {
        match self {
            Self::Wifi => "wifi0",
            Self::Lte => "lte0",
            Self::Plain => "plain0",
        }
    }

    /// The third number of its addresses, and what its route costs.
    fn number(self) -> u8 {
        match self {
            Self::Wifi => 1,
            Self::Lte => 2,
            Self::Plain => 4,
        }
    }
}

/// Where a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Beside the server.
    Server,
    /// On the way.
    Router,
    /// On the phone.
    Phone,
}

/// See the [module](self). Dropping it ends it.
#[derive(Debug)]
pub struct Rig {
    id: u32,
    /// Proxies and servers: they end first.
    children: Vec<Child>,
}

fn is_there(program: &str, args: &[&str]) -> bool {
    let status = std::process::Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Runs a command that must succeed.
async fn must(mut command: Command) {
    let output = command.stdin(Stdio::null()).output().await.expect("the command runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn words(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words);
    command
}

impl Rig {
    /// Builds the network, with the interfaces of `up`. `None` where that cannot be done here; `what` is then said to be skipped.
    ///
    /// # Panics
    ///
    /// If it cannot be built although it should.
    pub async fn build(what: &str, up: &[Interface]) -> Option<Self> {
        if !is_root() {
            skipped(what, "network namespaces need root");
            return None;
        }
        for (program, args) in [("ip", ["-V"].as_slice()), ("nft", &["-v"]), ("conntrack", &["-V"])] {
            if !is_there(program, args) {
                skipped(what, &format!("{program} is missing (packages iproute2, nftables, conntrack)"));
                return None;
            }
        }
        let this = Self { id: std::process::id(), children: Vec::new() };
        if !is_there("ip", &["netns", "add", &this.namespace(Place::Router)]) {
            skipped(what, "this system makes no network namespaces");
            return None;
        }
        this.lay(up).await;
        Some(this)
    }

    async fn lay(&self, up: &[Interface]) {
        let of = |place| self.namespace(place);
        let (server, router, phone) = (of(Place::Server), of(Place::Router), of(Place::Phone));
        let mut lines = vec![
            format!("ip netns add {server}"),
            format!("ip netns add {phone}"),
            format!("ip link add core netns {router} type veth peer name net0 netns {server}"),
            format!("ip -n {router} addr add 10.77.3.1/24 dev core"),
            format!("ip -n {router} addr add 10.77.3.9/24 dev core"),
            format!("ip -n {server} addr add {SERVER}/24 dev net0"),
            format!("ip -n {server} link set lo up"),
            format!("ip -n {router} link set lo up"),
            format!("ip -n {phone} link set lo up"),
            format!("ip -n {router} link set core up"),
            format!("ip -n {server} link set net0 up"),
            format!("ip netns exec {router} sysctl -qw net.ipv4.ip_forward=1"),
        ];
        for interface in Interface::ALL {
            let (name, number) = (interface.name(), interface.number());
            lines.extend([
                format!("ip link add {name} netns {phone} type veth peer name {name} netns {router}"),
                format!("ip -n {router} addr add 10.77.{number}.1/24 dev {name}"),
                format!("ip -n {router} link set {name} up"),
                format!("ip -n {phone} addr add 10.77.{number}.2/24 dev {name}"),
            ]);
        }
        for line in lines {
            must(words(&line)).await;
        }
        for interface in up {
            self.link(*interface, true).await;
        }
        let rules = "table ip mainstay {
  chain prerouting {
    type nat hook prerouting priority dstnat;
    iifname wifi0 udp dport 4433-4434 redirect to :7001
    iifname lte0 udp dport 4433-4434 redirect to :7002
  }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    oifname core udp dport 4433-4434 jump out
  }
  chain out {
    masquerade random
  }
}
";
        self.nft(rules).await;
    }

    async fn nft(&self, rules: &str) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), rules).expect("write");
        let mut command = self.command(Place::Router, Path::new("nft"));
        command.arg("-f").arg(file.path());
        must(command).await;
    }

    fn namespace(&self, place: Place) -> String {
        let place = match place {
            Place::Server => "server",
            Place::Router => "router",
            Place::Phone => "phone",
        };
        format!("mainstay-{}-{place}", self.id)
    }

    /// A command that runs there.
    pub fn command(&self, place: Place, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(place)]).arg(program);
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// The `mainstay` command there.
    pub fn mainstay(&self, place: Place, args: &[&str]) -> Command {
        let mut command = self.command(place, &binary());
        command.args(args);
        command
    }

    /// Starts the fault proxies of both networks, with the seed `seed` and the next.
    ///
    /// # Panics
    ///
    /// If they do not start.
    pub async fn impair(&mut self, seed: u64) {
        let tools = binary().with_file_name("mainstay-tests");
        for (port, delay, loss, seed) in [(7001, "10", "0", seed), (7002, "30", "1", seed.wrapping_add(1))] {
            let mut command = self.command(Place::Router, &tools);
            command.args(["proxy", "--listen", &format!("0.0.0.0:{port}"), "--upstream", &format!("{SERVER}:4433")]);
            command.args(["--delay-ms", delay, "--loss", loss, "--seed", &seed.to_string()]);
            let mut child = command.stdout(Stdio::piped()).spawn().expect("a proxy");
            let mut lines = BufReader::new(child.stdout.take().expect("output")).lines();
            let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("output");
            assert!(line.is_some_and(|line| line.starts_with("listening")), "the proxy does not listen");
            self.children.push(child);
        }
    }

    /// Starts a server on `dir` with more arguments, and returns what it says.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub async fn serve(&mut self, dir: &Path, more: &[&str]) -> Rows {
        let mut command = self.mainstay(Place::Server, &["serve", "--dev", "--json", "--data"]);
        command.arg(dir).args(more);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("a server");
        let mut rows = Rows::of(child.stdout.take().expect("output"));
        rows.until("listening").await;
        self.children.push(child);
        rows
    }

    /// Takes an interface of the phone up or down, with its route.
    ///
    /// # Panics
    ///
    /// If that fails.
    pub async fn link(&self, interface: Interface, up: bool) {
        let (phone, name, number) = (self.namespace(Place::Phone), interface.name(), interface.number());
        must(words(&format!("ip -n {phone} link set {name} {}", if up { "up" } else { "down" }))).await;
        if up {
            let via = format!("default via 10.77.{number}.1 dev {name} metric {number}");
            must(words(&format!("ip -n {phone} route replace {via}"))).await;
        }
    }

    /// The NAT forgets every flow, and gives the next ones other ports, of the address `ip` of the router (10.77.3.1 or 10.77.3.9) if there is one.
    ///
    /// # Panics
    ///
    /// If that fails.
    pub async fn forget_flows(&self, ip: Option<&str>) {
        if let Some(ip) = ip {
            self.nft(&format!("flush chain ip mainstay out\nadd rule ip mainstay out snat to {ip} random\n")).await;
        }
        let mut command = self.command(Place::Router, Path::new("conntrack"));
        command.args(["-F"]);
        must(command).await;
    }

    /// The connection file that the server wrote.
    pub fn connect(&self, dir: &Path) -> Value {
        let text = std::fs::read(dir.join("connect.json")).expect("a connection file");
        serde_json::from_slice(&text).expect("JSON")
    }
}

fn is_root() -> bool {
    // Files of this process belong to whom it runs as.
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").expect("/proc")) == 0
}

impl Drop for Rig {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended; what is in the namespaces ends with this.
            let _ = child.start_kill();
        }
        for place in [Place::Server, Place::Router, Place::Phone] {
            is_there("ip", &["netns", "del", &self.namespace(place)]);
        }
    }
}
