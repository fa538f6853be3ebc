//! `mainstay-checker`: checks histories, also archived ones.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use mainstay_checker::check;
use mainstay_checker::history::{Entry, complete, read, read_dump};
use mainstay_checker::verdict::Verdict;

/// Check what Mainstay's clients saw against what it promises.
///
/// Reads histories, one JSON object a line, and what `mainstay verify --dump` prints of the data directory behind them. Prints what was
/// looked at and every broken promise. Exits with 0 if all were kept, 1 if not, 2 if something cannot be read.
#[derive(Parser)]
struct Args {
    /// Histories, or directories whose `*.jsonl` files are each checked as one history.
    #[arg(required = true, value_name = "HISTORY")]
    histories: Vec<PathBuf>,
    /// What `mainstay verify --dump` printed, to be compared with the one history given.
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
    /// Fails unless these were provoked, for example `kills,resumes`.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    require: Vec<String>,
    /// One JSON object for each history.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("mainstay-checker: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> io::Result<bool> {
    let paths = paths(&args.histories)?;
    if args.dump.is_some() && paths.len() != 1 {
        return Err(io::Error::other("--dump is of one history"));
    }
    let mut sound = true;
    for path in paths {
        let mut entries = open(&path).and_then(read).map_err(|error| named(&path, &error))?;
        if let Some(dump) = &args.dump {
            let at = entries.iter().map(|entry| entry.at).max().unwrap_or(0);
            let dumped = open(dump).and_then(read_dump).map_err(|error| named(dump, &error))?;
            let complete = complete(&entries, dumped);
            entries.extend(complete.into_iter().map(|event| Entry { at, process: "disk".into(), event }));
        }
        let verdict = check(entries, &args.require);
        sound &= verdict.is_sound();
        print(&path, &verdict, args.json)?;
    }
    Ok(sound)
}

fn open(path: &Path) -> io::Result<BufReader<File>> {
    File::open(path).map(BufReader::new)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn paths(given: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for path in given {
        if !path.is_dir() {
            paths.push(path.clone());
            continue;
        }
        let mut inside = Vec::new();
        for entry in path.read_dir().map_err(|error| named(path, &error))? {
            inside.push(entry?.path());
        }
        inside.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
        if inside.is_empty() {
            return Err(io::Error::other(format!("{}: no *.jsonl in it", path.display())));
        }
        inside.sort();
        paths.append(&mut inside);
    }
    Ok(paths)
}

fn print(path: &Path, verdict: &Verdict, json: bool) -> io::Result<()> {
    if json {
        let mut value = serde_json::to_value(verdict)?;
        value["history"] = path.display().to_string().into();
        println!("{value}");
        return Ok(());
    }
    let said = if verdict.is_sound() { "every promise kept" } else { "BROKEN" };
    let counts: Vec<String> = verdict.counts.iter().map(|(what, count)| format!("{what} {count}")).collect();
    println!("{}: {said}; {}", path.display(), counts.join(", "));
    for (class, count) in &verdict.broken {
        let (property, what) = class.property();
        println!("  {property} {} ×{count}: {what}", class.name());
        for violation in verdict.violations.iter().filter(|violation| violation.class == *class) {
            println!("    {}: {}", violation.session, violation.what);
        }
    }
    Ok(())
}
