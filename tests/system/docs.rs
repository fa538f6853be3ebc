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
            line if line.starts_with("```") => {
                let other = block(&mut lines);
                let command = other.iter().find(|line| line.trim_start_matches("$ ").starts_with("mainstay "));
                assert_eq!(command, None, "a command in a block that is not run");
            }
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
    let mut script = String::new();
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
    let (said, wrong) = shell(dir.path(), &script).await;
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

/// Runs a script in a directory, with the binary under test in its path; returns what it said and what went wrong. It has to come to its end.
async fn shell(dir: &Path, script: &str) -> (String, String) {
    // Whoever types the next command does so once the server has said that it listens.
    const LISTENING: &str = "listening() { for _ in $(seq 200); do mainstay top --once >top.out 2>&1 && return; sleep 0.05; done; cat top.out; exit 1; }";
    let script = format!("set -eu\nset -m\n{LISTENING}\n{script}\necho '-- done'\n");
    let here = binary().parent().expect("a directory").display().to_string();
    let path = format!("{here}:{}", std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("bash");
    shell
        .arg("-c")
        .arg(&script)
        .current_dir(dir)
        .env("PATH", path)
        .env("HOME", dir)
        .env("XDG_STATE_HOME", dir.join("state"))
        .env_remove("MAINSTAY_CONNECT")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    // Files: what goes on in the background would hold pipes open.
    let (out, err) = (dir.join("out"), dir.join("err"));
    shell.stdout(std::fs::File::create(&out).expect("a file")).stderr(std::fs::File::create(&err).expect("a file"));
    let mut child = shell.spawn().expect("a shell");
    let status = timeout(Duration::from_secs(200), child.wait()).await;
    // What it left in the background is its own: `set -m` gives each job a group, and they all have this directory.
    end_all_in(dir);
    let read = |path| String::from_utf8_lossy(&std::fs::read(path).expect("an output")).into_owned();
    let (said, wrong) = (read(&out), read(&err));
    assert!(said.contains("-- done"), "the commands failed ({status:?}):\n{said}\n{wrong}");
    (said, wrong)
}

/// How a command of the README is run.
enum How {
    /// To its end.
    Through,
    /// In another terminal, which the next command waits for to say this.
    Beside(&'static str),
}

/// The commands of the README, and what is typed beside which.
const README: [(&str, How); 13] = [
    ("mainstay serve --dev", How::Beside("listening on")),
    ("mainstay tail agent:session123", How::Beside("")),
    ("seq 1 1000000 | mainstay append agent:session123", How::Through),
    ("mainstay run chat -- ./my-agent", How::Beside("has begun")),
    ("mainstay run chat --standby -- ./my-agent", How::Beside("standing by")),
    ("mainstay tail chat --fold", How::Beside("working")),
    ("echo \"do it\" | mainstay append chat --role user", How::Through),
    ("mainstay signal chat interrupt --text \"shorter\"", How::Through),
    ("echo \"and then?\" | mainstay append chat --role user --outbox ~/.outbox", How::Through),
    ("mainstay signal chat cancel --outbox ~/.outbox --valid-for 60", How::Through),
    ("mainstay serve --dev --takeover", How::Beside("listening on")),
    ("mainstay notify rule chat phone --principal alice --on request,run-end --delay 30", How::Through),
    ("mainstay notify work --webhook https://push.example/told", How::Beside("waiting for jobs")),
];

/// Runs them, in one shell and in their order.
async fn follow_readme() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = std::fs::read_to_string(root().join("README.md")).expect("the README");
    let blocks = text.split("```").skip(1).step_by(2).filter(|block| block.starts_with('\n'));
    let commands = blocks.flat_map(str::lines).filter(|line| !line.is_empty() && !line.starts_with("cargo "));
    let commands: Vec<&str> = commands.map(|line| line.split(" # ").next().unwrap_or_default().trim_end()).collect();
    let known: Vec<&str> = README.iter().map(|(command, _)| *command).collect();
    assert_eq!(commands, known, "what the README shows is run here");
    // It goes on when it is interrupted: a cancel ends it.
    let agent = "#!/bin/sh\ntrap 'echo in short' INT\necho working\nwhile true; do read line && echo did $line || sleep 0.1; done\n";
    std::fs::write(dir.path().join("my-agent"), agent).expect("an agent");
    let mut script = String::from("chmod +x my-agent\n");
    script.push_str(
        "says() { for _ in $(seq 400); do grep -q \"$1\" $2 && return; sleep 0.05; done; cat $2; exit 1; }\n",
    );
    for (at, (command, how)) in README.iter().enumerate() {
        script.push_str(&match how {
            How::Through => format!("{command}\n"),
            How::Beside("") => format!("{command} >{at}.out 2>&1 &\n"),
            How::Beside(said) => format!("{command} >{at}.out 2>&1 &\nsays '{said}' {at}.out\n"),
        });
    }
    // The follower has all of what was appended, and the conversation is what was said.
    script.push_str("says '^1000000$' 1.out\nsays 'did do it' 5.out\nsays 'in short' 5.out\n");
    let (said, wrong) = shell(dir.path(), &script).await;
    for shown in ["appended 1000000 records", "interrupt accepted", "cancel accepted", "is in force"] {
        let told = said.contains(shown) || wrong.contains(shown);
        assert!(told, "{shown:?} is not in:\n{said}\n{wrong}");
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
    // One default address on this machine: the pages and the README are one test.
    follow_readme().await;
    if has("openssl") && has("curl") {
        return follow(&PAGES).await;
    }
    mainstay_tests::skipped("the commands of guides/operations.md", "openssl or curl is missing");
    follow(&PAGES[..5]).await;
}

/// Every page of the documentation that people write, the README and what else stands beside it.
fn pages() -> Vec<(String, String)> {
    let root = root();
    let mut pages: Vec<PathBuf> =
        ["README.md", "SECURITY.md", "CONTRIBUTING.md"].iter().map(|name| root.join(name)).collect();
    for dir in ["docs/src", "docs/src/guides", "spec"] {
        let entries = std::fs::read_dir(root.join(dir)).expect("a directory");
        pages.extend(
            entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|it| it == "md")),
        );
    }
    let read = |path: PathBuf| (path.display().to_string(), std::fs::read_to_string(&path).expect("a page"));
    pages.into_iter().map(read).collect()
}

/// What is named in the text, in a table or between commands, exists as it is written.
#[test]
fn every_command_that_a_page_names_is_one() {
    let mut looked_at = 0;
    let mut wrong = Vec::new();
    for (page, text) in pages() {
        for span in text.split('`').skip(1).step_by(2).filter(|span| span.starts_with("mainstay ")) {
            // Of what goes on in general nothing; the words of a reader are good values.
            let words =
                span.split_whitespace().skip(1).take_while(|word| !word.starts_with(['…', '[', '(']) && *word != "--");
            let words: Vec<&str> = words.collect();
            let alternatives = words.iter().map(|word| word.split('|').count()).max().unwrap_or(1);
            for nth in 0..alternatives {
                let of =
                    |word: &&'_ str| word.split('|').nth(nth).or(word.split('|').next()).unwrap_or_default().to_owned();
                let words: Vec<String> = words.iter().map(of).collect();
                let output =
                    std::process::Command::new(binary()).args(&words).arg("--help").output().expect("the binary");
                looked_at += 1;
                if !output.status.success() {
                    wrong.push(format!("{page}: `{span}`: {words:?}: {}", String::from_utf8_lossy(&output.stderr)));
                }
            }
        }
    }
    assert!(looked_at > 20, "only {looked_at} commands are named");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_page_shows_a_command_that_is_not_run() {
    let dir = root().join("docs").join("src");
    for page in ["concepts.md", "comparison.md", "introduction.md", "runbook.md", "threat-model.md"] {
        let text = std::fs::read_to_string(dir.join(page)).expect("a page");
        assert!(steps(&text).is_empty(), "{page} has commands; list it in the test above");
    }
}
