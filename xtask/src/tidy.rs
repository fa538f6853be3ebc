//! Rules about the tree that no compiler checks.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Outcome;

/// Which of our crates a crate may use. Arrows point down only.
const EDGES: &[(&str, &[&str])] = &[
    ("protocol", &[]),
    ("store", &["protocol"]),
    ("store/fjall", &["protocol", "store"]),
    ("transport", &["protocol"]),
    ("server", &["protocol", "store", "transport"]),
    ("client", &["protocol", "transport"]),
    ("checker", &[]),
    ("bench", &["protocol", "transport", "client", "tests"]),
    ("cli", &["protocol", "store", "store-fjall", "transport", "server", "client", "bench"]),
];

/// Checks the tree. Errors: every rule that is broken, one a line.
pub(crate) fn run(root: &Path) -> Outcome {
    eprintln!("== tidy");
    let mut broken = Vec::new();
    edges(root, &mut broken);
    let mut sources = Vec::new();
    for dir in EDGES.iter().map(|(dir, _)| *dir).chain(["tests", "sim", "xtask", "fuzz"]) {
        collect(&root.join(dir), &mut sources);
    }
    for path in &sources {
        source(root, path, &mut broken);
    }
    requirements(root, &sources, &mut broken);
    tests_that_are_named(root, &mut broken);
    planted(root, &mut broken);
    if broken.is_empty() { Ok(()) } else { Err(format!("the tree is not tidy:\n  {}", broken.join("\n  "))) }
}

fn edges(root: &Path, broken: &mut Vec<String>) {
    for (dir, allowed) in EDGES {
        let Ok(manifest) = fs::read_to_string(root.join(dir).join("Cargo.toml")) else {
            broken.push(format!("{dir}/Cargo.toml is missing"));
            continue;
        };
        // Tests of a crate may use more.
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        for line in dependencies.lines() {
            let Some(rest) = line.strip_prefix("mainstay-") else { continue };
            let used = rest.split(['.', ' ', '=']).next().unwrap_or_default();
            if !allowed.contains(&used) {
                broken.push(format!("{dir} may not use mainstay-{used}"));
            }
        }
    }
}

fn collect(dir: &Path, sources: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() && name != "target" {
            collect(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !sources.contains(&path) {
            sources.push(path);
        }
    }
}

fn source(root: &Path, path: &Path, broken: &mut Vec<String>) {
    let name = path.strip_prefix(root).unwrap_or(path).display();
    let text = fs::read_to_string(path).unwrap_or_default();
    if !text.starts_with("//!") && !text.starts_with("#!") {
        broken.push(format!("{name} does not say what it is for (//!)"));
    }
    // Put together here so that this file does not break its own rule.
    for mark in [["TO", "DO"], ["FIX", "ME"], ["#[", "ignore"]].map(|parts| parts.concat()) {
        if text.contains(&mark) {
            broken.push(format!("{name} holds {mark}"));
        }
    }
}

/// Every requirement id that the code cites must stand in the spec, no id twice, and each must be cited where it is kept or tested.
fn requirements(root: &Path, sources: &[PathBuf], broken: &mut Vec<String>) {
    let mut known = Vec::new();
    let Ok(entries) = fs::read_dir(root.join("spec")) else {
        broken.push("spec/ is missing".into());
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        for line in fs::read_to_string(&path).unwrap_or_default().lines() {
            let Some((id, _)) = line.strip_prefix("**").and_then(|line| line.split_once("**")) else { continue };
            if is_id(id) {
                if known.contains(&id.to_owned()) {
                    broken.push(format!("requirement {id} stands twice in the spec"));
                }
                known.push(id.to_owned());
            }
        }
    }
    let mut cited = Vec::new();
    for path in sources {
        let text = fs::read_to_string(path).unwrap_or_default();
        for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-') {
            if is_id(word) && !cited.contains(&word.to_owned()) {
                cited.push(word.to_owned());
            }
            if is_id(word) && !known.contains(&word.to_owned()) {
                let name = path.strip_prefix(root).unwrap_or(path).display();
                broken.push(format!("{name} cites {word}, which the spec does not have"));
            }
        }
    }
    for id in known.iter().filter(|id| !cited.contains(id)) {
        broken.push(format!("requirement {id} is cited by no code or test"));
    }
}

/// Where it is listed what the tools found, and which test holds each.
const FOUND: &str = "sim/FOUND.md";

/// Every test that the list of what was found names must be in the file that is named with it.
fn tests_that_are_named(root: &Path, broken: &mut Vec<String>) {
    let text = fs::read_to_string(root.join(FOUND)).unwrap_or_default();
    let mut named = 0;
    for line in text.lines() {
        // `file`: `test`, or `test` in `file`.
        let parts: Vec<&str> = line.split('`').skip(1).collect();
        for (first, between, second) in parts.windows(3).step_by(2).map(|three| (three[0], three[1], three[2])) {
            let (file, test) = match between {
                ": " => (first, second),
                " in " => (second, first),
                _ => continue,
            };
            named += 1;
            let source = fs::read_to_string(root.join(file)).unwrap_or_default();
            if !source.contains(&format!("fn {test}(")) {
                broken.push(format!("{FOUND} names {test}, which {file} does not have"));
            }
        }
    }
    if named == 0 {
        broken.push(format!("{FOUND} names no test"));
    }
}

/// The mistakes on purpose and their list must be of the same names.
fn planted(root: &Path, broken: &mut Vec<String>) {
    const LIST: &str = "sim/PLANTED.md";
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let (code, list) = (read("protocol/src/planted.rs"), read(LIST));
    // `Name = "its-name",`
    let word = |line: &str| line.trim().strip_suffix("\",")?.split_once(" \"").map(|(_, name)| name.to_owned());
    let made: Vec<String> = code.lines().filter_map(word).collect();
    let row = |line: &str| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name.to_owned());
    let listed: Vec<String> = list.lines().filter_map(row).collect();
    for name in made.iter().filter(|name| !listed.contains(name)) {
        broken.push(format!("{LIST} does not list {name}"));
    }
    for name in listed.iter().filter(|name| !made.contains(name)) {
        broken.push(format!("{LIST} lists {name}, which nothing makes"));
    }
    if made.is_empty() {
        broken.push("protocol/src/planted.rs names no mistake".into());
    }
}

/// The first parts of requirement ids.
const FAMILIES: &[&str] = &[
    "WIRE", "CONN", "AUTH", "REC", "KIND", "FOLD", "SESS", "SUB", "PROD", "DUR", "CHUNK", "CHAIN", "FLOW", "EARLY",
    "ERR", "MSG", "STATE", "PRES", "RUN", "SIG", "NOTE", "ROAM", "RES", "OUT", "COMPACT", "BACKUP", "LIM",
];

fn is_id(word: &str) -> bool {
    word.split_once('-').is_some_and(|(family, number)| {
        FAMILIES.contains(&family) && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}
