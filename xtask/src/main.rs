//! `cargo xtask`: everything that a contributor or CI runs.
//!
//! No dependencies, so that it builds in a moment.

mod campaign;
mod docs;
mod fuzz;
mod package;
mod supply;
mod tidy;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

pub(crate) const USAGE: &str = "\
Tasks:
  cargo xtask test                 everything that CI runs: format, lints, docs, every test, a short fuzz
  cargo xtask tidy                 what no other tool looks at: requirements that nothing cites, tests that lists name and that are not there
  cargo xtask fuzz [TARGET] [SECS] fuzz one target, or all in turn, for so long (default 60 s each)
  cargo xtask fuzz --smoke         every target for a few seconds, as in `test`
  cargo xtask fuzz --long [TARGET]  each parser a hundred million times: from a quarter of an hour on each
  cargo xtask fuzz --coverage [TARGET]  how many lines of the core their inputs reach
  cargo xtask fuzz --minimise [TARGET]  keep those inputs in fuzz/seeds that reach something that no other does
  cargo xtask mutants [ARGS]       change the codec and the core in every way, and see whether a test of theirs notices
  cargo xtask bench [ARGS…]        the load generator in release mode; without arguments the whole table
  cargo xtask sim [--seeds N]      simulated worlds, each from a seed (default 500); --seed S runs one again
  cargo xtask docs [--check]       make the reference from code and registry, and build the site
  cargo xtask package [--debug]    the Debian package
  cargo xtask sbom                 what the binary is made of
  cargo xtask campaign WHAT [--short]
                 kill [--seed S]   the real server killed again and again, at random moments and system calls
                 power [--seed S]  the power cut under it (root)
                 damage [--seed S] damaged data directories
                 hostile [--seed S] attackers beside honest clients
                 overload          five and ten times as much as can be done
                 planted           mistakes on purpose: each has to be found, or its like is skipped, and that is said
                 tests [SECS]      the random tests over and over with new seeds (default 1800 s)
";

type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["test"] => test(),
        ["tidy"] => tidy::run(&root()),
        ["fuzz", rest @ ..] => fuzz::run(rest),
        ["mutants", rest @ ..] => mutants(rest),
        ["bench", rest @ ..] => bench(rest),
        ["docs", rest @ ..] => docs::run(rest),
        ["package", rest @ ..] => package::run(rest),
        ["sbom"] => supply::sbom(),
        ["sim", rest @ ..] => campaign::sim(rest),
        ["campaign", rest @ ..] => campaign::run(rest),
        _ => Err(format!("unknown task\n\n{USAGE}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("xtask: {what}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Runs a step and says what it is and how long it took.
fn step(name: &str, command: &mut Command) -> Outcome {
    eprintln!("== {name}");
    let begun = Instant::now();
    let status = command.status().map_err(|error| format!("{name}: cannot run: {error}"))?;
    eprintln!(
        "== {name}: {} after {:.1} s",
        if status.success() { "ok" } else { "FAILED" },
        begun.elapsed().as_secs_f64()
    );
    if status.success() { Ok(()) } else { Err(format!("{name} failed ({status})")) }
}

/// True if a command runs and succeeds.
fn has(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

/// Says loudly that something was not done.
fn skipped(what: &str, why: &str) {
    eprintln!("== SKIPPED: {what}: {why}");
}

/// Installs a cargo subcommand that is missing.
fn need(subcommand: &str, package: &str) -> Outcome {
    if has("cargo", &[subcommand, "--version"]) {
        return Ok(());
    }
    install(package)
}

/// Installs a program of a package that is missing.
pub(crate) fn install(package: &str) -> Outcome {
    eprintln!("== installing {package}, which is missing");
    let mut install = cargo(&["install", "--locked", package]);
    // What it does here takes seconds, or is to wait for others: what its authors do for speed costs more than it brings.
    for (setting, value) in [("LTO", "off"), ("OPT_LEVEL", "0"), ("CODEGEN_UNITS", "16"), ("DEBUG", "0")] {
        install.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }
    step(&format!("install {package}"), &mut install)
}

/// Installs what the tests over network namespaces and the crash campaigns need, where that can be done.
fn tools() -> Outcome {
    let tools = [
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("conntrack", "conntrack"),
        ("strace", "strace"),
        ("mkfs.ext4", "e2fsprogs"),
        ("openssl", "openssl"),
        ("curl", "curl"),
    ];
    let missing: Vec<&str> = {
        let there = |program: &str| has("sh", &["-c", &format!("command -v {program}")]);
        tools.into_iter().filter(|(program, _)| !there(program)).map(|(_, package)| package).collect()
    };
    if missing.is_empty() || !has("apt-get", &["--version"]) || !has("sh", &["-c", "test $(id -u) = 0"]) {
        // What is not there is said by the tests that need it.
        return Ok(());
    }
    let install = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(["-q", "-y", "--no-install-recommends"]).args(args).env("DEBIAN_FRONTEND", "noninteractive");
        step(&format!("apt-get {}", args.join(" ")), &mut command)
    };
    let installed = install(&["update"]).and_then(|()| install(&[&["install"], missing.as_slice()].concat()));
    if installed.is_err() {
        skipped("tests over network namespaces and at system calls", "the packages cannot be installed");
    }
    Ok(())
}

fn test() -> Outcome {
    tools()?;
    tidy::run(&root())?;
    step("format", &mut cargo(&["fmt", "--all", "--", "--check"]))?;
    step("build", &mut cargo(&["build", "--workspace", "--all-targets", "--locked"]))?;
    step("lints", &mut cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))?;
    wasm()?;
    need("nextest", "cargo-nextest")?;
    tests("tests", &mut cargo(&["nextest", "run", "--workspace", "--locked"]))?;
    // Left to the good network: what needs more than the bad one carries, what measures time, and what a connection is closed with,
    // which a peer does not learn where the last datagrams are lost.
    // The whole workspace, or its crates would be built again with other features.
    let mut network = cargo(&["nextest", "run", "--workspace", "--locked"]);
    let network = network
        .args(["-E", "package(mainstay-tests) & test(/^(crash|tail|cli|disk|hostile|basics)::/) - test(/no_space|refused_attachments|control|credit_for|registry_does_not|says_nothing/)"])
        .env("MAINSTAY_NETWORK", "mobile");
    tests("tests over a bad network", network)?;
    step("doc examples", &mut cargo(&["test", "--doc", "--workspace", "--locked"]))?;
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--locked"]);
    step("documentation", doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    // As it was built with everything else.
    step("demo", Command::new(root().join("target").join("debug").join("mainstay")).arg("demo"))?;
    docs::run(&["--check"])?;
    package::run(&["--debug"])?;
    campaign::short()?;
    supply::floors()?;
    deny()?;
    fuzz::run(&["--smoke"])
}

/// The core must build without a runtime, a clock or a socket.
fn wasm() -> Outcome {
    // Adding it when it is there does nothing.
    if !has("rustup", &["target", "add", "wasm32-unknown-unknown"]) {
        skipped("protocol on wasm32", "the target cannot be installed (rustup target add wasm32-unknown-unknown)");
        return Ok(());
    }
    step(
        "protocol on wasm32",
        &mut cargo(&["build", "-p", "mainstay-protocol", "--target", "wasm32-unknown-unknown", "--locked"]),
    )
}

/// Licences, bans and sources. The advisory database needs a network that CI may not have.
fn deny() -> Outcome {
    need("deny", "cargo-deny")?;
    // The policy is about the whole lock file, also what only other platforms need; a build did not download that.
    step("fetch", &mut cargo(&["fetch", "--locked"]))?;
    step("dependency policy", &mut cargo(&["deny", "--offline", "check", "bans", "licenses", "sources"]))
}

/// Runs tests, and says which of them could not do what they are for here.
fn tests(what: &str, command: &mut Command) -> Outcome {
    let unseen = root().join("target").join("skipped-tests");
    // A list of an earlier run is not of this one.
    let _ = std::fs::remove_file(&unseen);
    // Most tests wait most of the time.
    let threads = 2 * std::thread::available_parallelism().map_or(1, usize::from);
    let command = command.args(["--test-threads", &threads.to_string()]);
    step(what, command.env("MAINSTAY_SKIPPED", &unseen))?;
    for line in std::fs::read_to_string(&unseen).unwrap_or_default().lines() {
        let (what, why) = line.split_once(": ").unwrap_or((line, "the test does not say why"));
        skipped(what, why);
    }
    Ok(())
}

/// Changes the codec and the core in one way after the other, and runs their tests each time: hours, or less with `--shard 0/50`.
fn mutants(args: &[&str]) -> Outcome {
    need("nextest", "cargo-nextest")?;
    need("mutants", "cargo-mutants")?;
    let mut command = cargo(&["mutants", "-p", "mainstay-protocol", "--test-tool", "nextest", "--timeout", "60"]);
    // What tests draw does not change between two of them.
    command.args(args).env("MAINSTAY_SEED", "7").env("NEXTEST_PROFILE", "mutants");
    // Nobody looks at where they failed.
    step("mutants", command.env("CARGO_PROFILE_DEV_DEBUG", "0").current_dir(root()))
}

fn bench(args: &[&str]) -> Outcome {
    let mut command = cargo(&["run", "--release", "--quiet", "--locked", "-p", "mainstay", "--", "bench"]);
    step("bench", command.args(if args.is_empty() { &["all"] } else { args }))
}
