//! The documentation site, and the part of it that is made from code and registry.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::{Outcome, has, install, root, skipped, step};

/// Makes the reference and builds the site. With `--check` nothing is written: it is an error if the reference is not what it would be.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let check = args.contains(&"--check");
    let dir = root().join("docs").join("src").join("reference");
    let mut old = Vec::new();
    for (name, text) in
        [("commands.md", commands()?), ("settings.md", settings()?), ("errors.md", errors()?), ("limits.md", limits()?)]
    {
        let path = dir.join(name);
        if check {
            if fs::read_to_string(&path).is_ok_and(|now| now == text) {
                continue;
            }
            old.push(name);
        } else {
            fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        }
    }
    if !old.is_empty() {
        return Err(format!(
            "docs/src/reference: {} not made from what is there; run `cargo xtask docs`",
            old.join(", ")
        ));
    }
    links()?;
    if check && !has("mdbook", &["--version"]) {
        // Building it takes minutes, and what can go wrong was looked at.
        skipped("the site", "mdbook is not installed; `cargo xtask docs` installs it and builds");
        return Ok(());
    }
    if !has("mdbook", &["--version"]) {
        install("mdbook")?;
    }
    step("site", Command::new("mdbook").args(["build", "docs"]).current_dir(root()))
}

/// Runs the binary that was built with everything else.
fn mainstay(args: &[&str]) -> Result<String, String> {
    let binary = root().join("target").join("debug").join("mainstay");
    // Help is as wide as the terminal is, and there is none.
    let output = Command::new(&binary).args(args).env("COLUMNS", "100").env_remove("MAINSTAY_CONNECT").output();
    let output = output.map_err(|error| format!("{}: {error}; build it first", binary.display()))?;
    let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    String::from_utf8(text).map_err(|error| error.to_string())
}

const MADE: &str = "<!-- Made by `cargo xtask docs`. -->\n\n";

/// Help of every command.
fn commands() -> Result<String, String> {
    let mut text = format!("{MADE}# Command line\n\nWhat `--help` says.\n");
    let top = mainstay(&["--help"])?;
    let names = top.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let names = names.take_while(|line| !line.is_empty()).filter_map(|line| {
        let name = line.strip_prefix("  ")?.split(' ').next()?;
        (!name.is_empty() && name != "help").then(|| name.to_owned())
    });
    for name in names {
        let help = mainstay(&[&name, "--help"])?;
        // Writing to a string does not fail.
        let _ = write!(text, "\n## mainstay {name}\n\n```text\n{}\n```\n", trimmed(&help));
        let inner = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
        let inner = inner.take_while(|line| !line.is_empty()).filter_map(|line| {
            let name = line.strip_prefix("  ")?.split(' ').next()?;
            (!name.is_empty() && name != "help").then(|| name.to_owned())
        });
        for under in inner.collect::<Vec<_>>() {
            let help = mainstay(&[&name, &under, "--help"])?;
            let _ = write!(text, "\n### mainstay {name} {under}\n\n```text\n{}\n```\n", trimmed(&help));
        }
    }
    Ok(text)
}

/// Without blanks at the ends of lines.
fn trimmed(text: &str) -> String {
    text.trim_end().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

fn settings() -> Result<String, String> {
    let text = mainstay(&["serve", "--print-config"])?;
    Ok(format!(
        "{MADE}# Settings of a server\n\nWhat `mainstay serve --print-config` prints.\n\n```toml\n{}\n```\n",
        text.trim_end()
    ))
}

fn registry() -> Result<String, String> {
    fs::read_to_string(root().join("spec").join("registry.toml")).map_err(|error| format!("the registry: {error}"))
}

/// The lines of a table of the registry.
fn table<'a>(registry: &'a str, name: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let head = format!("[{name}]");
    let lines = registry.lines().skip_while(move |line| *line != head).skip(1);
    lines.take_while(|line| !line.starts_with('[')).filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        (!line.starts_with('#')).then_some((name.trim(), value.trim()))
    })
}

/// A quoted field of an inline table.
fn inline<'a>(entry: &'a str, field: &str) -> Option<&'a str> {
    let rest = entry.split_once(&format!("{field} = \""))?.1;
    rest.split('"').next()
}

fn errors() -> Result<String, String> {
    let registry = registry()?;
    let mut text = format!(
        "{MADE}# Errors\n\nWhat a server says when it does not do what was asked, by the name that `--json` and logs show. *Ends* says what is over with \
         it; *do* what helps: **retry** the same later, **reattach**, **reauthenticate** with another token, **fix** the request, or **give \
         up**. The number beside it means what the last column says.\n\n| name | ends | do | number |\n|---|---|---|---|\n"
    );
    for (name, entry) in table(&registry, "errors") {
        let of = |field| inline(entry, field).unwrap_or("");
        let _ = writeln!(text, "| `{name}` | {} | {} | {} |", of("ends"), of("advice"), of("value"));
    }
    Ok(text)
}

fn limits() -> Result<String, String> {
    let registry = registry()?;
    let mut text = format!(
        "{MADE}# Limits of the protocol\n\nThe same everywhere; lengths are in bytes, times in milliseconds. What a server allows each peer is a \
         [setting](settings.md).\n\n| limit | value |\n|---|---|\n"
    );
    for (name, value) in table(&registry, "limits") {
        let _ = writeln!(text, "| `{name}` | {value} |");
    }
    Ok(text)
}

/// Every page is in the summary, and every link inside the site leads to a page.
fn links() -> Outcome {
    let dir = root().join("docs").join("src");
    let mut pages: Vec<PathBuf> = Vec::new();
    let mut open = vec![dir.clone()];
    while let Some(next) = open.pop() {
        let entries = fs::read_dir(&next).map_err(|error| format!("{}: {error}", next.display()))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == "md") {
                pages.push(path);
            }
        }
    }
    let summary = fs::read_to_string(dir.join("SUMMARY.md")).map_err(|error| format!("SUMMARY.md: {error}"))?;
    let mut wrong = Vec::new();
    for page in &pages {
        let name = page.strip_prefix(&dir).unwrap_or(page).display().to_string();
        if name != "SUMMARY.md" && !summary.contains(&format!("({name})")) {
            wrong.push(format!("{name} is not in the summary"));
        }
        let text = fs::read_to_string(page).map_err(|error| format!("{name}: {error}"))?;
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let link = link.split('#').next().unwrap_or_default();
            if link.is_empty() || link.contains("://") {
                continue;
            }
            if !page.parent().is_some_and(|dir| dir.join(link).is_file()) {
                wrong.push(format!("{name} links to {link}, which is not there"));
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
}
