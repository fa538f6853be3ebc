//! The path of a newcomer, from the documentation alone: every command in it is run, page by page, and says what the page says that it says.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use mainstay_tests::process::binary;
use tokio::process::Command;
use tokio::time::timeout;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").to_owned()
}

/// One block of commands, and what the page shows behind it.
struct Step {
    script: String,
    shown: Vec<String>,
}

/// The steps of a page: blocks of `sh`, each with the block of `text` that follows it.
fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let block = |lines: &mut std::str::Lines<'_>| -> Vec<String> {
            lines.take_while(|line| *line != "```").map(str::to_owned).collect()
        };
        match line {
            "```sh" => steps.push(Step { script: block(&mut lines).join("\n"), shown: Vec::new() }),
            "```text" => steps.last_mut().expect("commands before what they show").shown = block(&mut lines),
            line if line.starts_with("```") => drop(block(&mut lines)),
            _ => {}
        }
    }
    steps
}

/// Runs the pages in one shell, as somebody would who reads one after the other.
async fn follow(pages: &[&str]) {
    const MARK: &str = "-- step";
    let dir = tempfile::tempdir().expect("a directory");
    let root = root();
    let mut script = String::from("set -eu\nset -m\n");
    // Whoever types the next command does so once the server has said that it listens.
    script.push_str("listening() { for _ in $(seq 200); do mainstay top --once >top.out 2>&1 && return; sleep 0.05; done; cat top.out; exit 1; }\n");
    let mut expected = Vec::new();
    for page in pages {
        let text = std::fs::read_to_string(root.join("docs").join("src").join(page)).expect("a page");
        let found = steps(&text);
        assert!(!found.is_empty(), "{page} has no commands");
        for (at, step) in found.into_iter().enumerate() {
            script.push_str(&format!("echo '{MARK} {page} {at}'\n{}\n", step.script));
            if step.script.contains("serve --dev") {
                script.push_str("listening\n");
            }
            if step.script.contains("serve --config") {
                script.push_str("for _ in $(seq 100); do curl -sf http://127.0.0.1:9434/livez >top.out && break; sleep 0.05; done\n");
            }
            expected.push((format!("{MARK} {page} {at}"), step.shown));
        }
    }
    script.push_str("echo '-- done'\n");
    let here = binary().parent().expect("a directory").display().to_string();
    let path = format!("{here}:{}", std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("bash");
    shell
        .arg("-c")
        .arg(&script)
        .current_dir(dir.path())
        .env("PATH", path)
        .env("XDG_STATE_HOME", dir.path().join("state"))
        .env_remove("MAINSTAY_CONNECT")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    // Files: what goes on in the background would hold pipes open.
    let (out, err) = (dir.path().join("out"), dir.path().join("err"));
    shell.stdout(std::fs::File::create(&out).expect("a file")).stderr(std::fs::File::create(&err).expect("a file"));
    let mut child = shell.spawn().expect("a shell");
    let status = timeout(Duration::from_secs(200), child.wait()).await;
    // What it left in the background is its own: `set -m` gives each job a group, and they all have this directory.
    end_all_in(dir.path());
    let read = |path| String::from_utf8_lossy(&std::fs::read(path).expect("an output")).into_owned();
    let (said, wrong) = (read(&out), read(&err));
    assert!(said.contains("-- done"), "the commands failed ({status:?}):\n{said}\n{wrong}");
    for (mark, shown) in expected {
        let part = said.split(&mark).nth(1).expect("the step").split(MARK).next().unwrap_or_default();
        let mut rest = part;
        for line in shown.iter().filter(|line| !line.is_empty()) {
            let at = rest.find(line.as_str());
            let at = at.unwrap_or_else(|| panic!("{mark} does not say {line:?}, but:\n{part}\n{wrong}"));
            rest = &rest[at + line.len()..];
        }
    }
}

/// Ends the processes that work in a directory: those that a page started in the background.
fn end_all_in(dir: &Path) {
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    for process in processes.flatten() {
        let id = process.file_name().to_string_lossy().into_owned();
        if std::fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir)) {
            let _ = std::process::Command::new("kill").args(["-9", &id]).status();
        }
    }
}

/// The last one makes a certificate, and asks over HTTP.
const PAGES: [&str; 6] = [
    "start.md",
    "guides/agent.md",
    "guides/roaming.md",
    "guides/tokens.md",
    "guides/takeover.md",
    "guides/operations.md",
];

#[tokio::test]
async fn a_newcomer_gets_through_the_documentation() {
    let has = |program: &str| {
        let there = std::process::Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
        there.is_ok_and(|output| output.status.success())
    };
    // One default address on this machine: the pages are one test.
    if has("openssl") && has("curl") {
        return follow(&PAGES).await;
    }
    mainstay_tests::skipped("the commands of guides/operations.md", "openssl or curl is missing");
    follow(&PAGES[..5]).await;
}

#[test]
fn no_page_shows_a_command_that_is_not_run() {
    let dir = root().join("docs").join("src");
    for page in ["concepts.md", "comparison.md", "introduction.md", "runbook.md", "threat-model.md"] {
        let text = std::fs::read_to_string(dir.join(page)).expect("a page");
        assert!(steps(&text).is_empty(), "{page} has commands; list it in the test above");
    }
}
