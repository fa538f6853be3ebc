//! Fuzzing with cargo-fuzz, which needs a nightly toolchain.

use std::fs;
use std::process::Command;

use crate::{Outcome, has, need, root, skipped, step};

/// Seconds for each target in the smoke run.
const SMOKE: &str = "10";

/// Runs the targets as the arguments say.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let targets = targets()?;
    let (chosen, seconds): (Vec<String>, &str) = match args {
        ["--smoke"] => (targets, SMOKE),
        [] => (targets, "60"),
        [target] => (vec![known(target, &targets)?], "60"),
        [target, seconds] => (vec![known(target, &targets)?], *seconds),
        _ => return Err("too many arguments".into()),
    };
    let nightly = || has("cargo", &["+nightly", "--version"]);
    if !nightly() {
        eprintln!("== installing the nightly toolchain, which is missing");
        // Where that fails it is said below.
        let _ = Command::new("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal"]).status();
    }
    if !nightly() {
        skipped("fuzzing", "there is no nightly toolchain, and rustup cannot install one");
        return Ok(());
    }
    need("fuzz", "cargo-fuzz")?;
    seeds()?;
    for target in chosen {
        let mut command = Command::new("cargo");
        command.current_dir(root()).args(["+nightly", "fuzz", "run", &target]);
        // New inputs go into the first.
        command.arg(corpus(&target)?);
        let kept = root().join("fuzz").join("seeds").join(&target);
        if kept.is_dir() {
            command.arg(kept);
        }
        command
            .args(["--", "-rss_limit_mb=1024", "-timeout=10"])
            .arg(format!("-max_total_time={seconds}"))
            // The nightly of the command line counts, not the toolchain of this repository.
            .env_remove("CARGO")
            .env_remove("RUSTC")
            .env_remove("RUSTDOC")
            .env("RUSTUP_TOOLCHAIN", "nightly");
        step(&format!("fuzz {target} for {seconds} s"), &mut command)?;
    }
    Ok(())
}

fn known(target: &str, targets: &[String]) -> Result<String, String> {
    if targets.iter().any(|known| known == target) {
        return Ok(target.to_owned());
    }
    Err(format!("no fuzz target is called {target}; there are: {}", targets.join(", ")))
}

/// The targets, by their files.
fn targets() -> Result<Vec<String>, String> {
    let dir = root().join("fuzz").join("fuzz_targets");
    let entries = fs::read_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut targets: Vec<String> =
        entries.flatten().filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned())).collect();
    targets.sort();
    Ok(targets)
}

/// Targets, and the first bytes that their inputs need beside those of a vector.
type Uses = &'static [(&'static str, &'static [u8])];

/// Makes seeds of the vectors: each `hex` of a file is one input of the targets that read such bytes, or several: with each
/// first byte that says where the bytes go. What no vector can be a seed of has some in `fuzz/seeds`.
fn seeds() -> Outcome {
    let uses: [(&str, Uses); 4] = [
        (
            "frames.toml",
            &[
                ("frame_decode", &[]),
                ("frame_roundtrip", &[]),
                ("deframer", &[6]),
                ("server_connection", &[0, 1, 2, 3, 5]),
                ("client_connection", &[0, 1, 2, 3]),
            ],
        ),
        ("records.toml", &[("records", &[])]),
        ("chunks.toml", &[("chunk_decode", &[])]),
        ("states.toml", &[("chunk_decode", &[])]),
    ];
    for (file, targets) in uses {
        let path = root().join("spec").join("vectors").join(file);
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let inputs = text.lines().filter_map(|line| line.strip_prefix("hex = \"")?.strip_suffix('"'));
        for (number, hex) in inputs.enumerate() {
            let bytes: Option<Vec<u8>> =
                (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()).collect();
            let bytes = bytes.ok_or_else(|| format!("{file}: not hexadecimal"))?;
            for (target, places) in targets {
                let dir = corpus(target)?;
                let write = |name: String, bytes: &[u8]| {
                    let seed = dir.join(name);
                    fs::write(&seed, bytes).map_err(|error| format!("{}: {error}", seed.display()))
                };
                if places.is_empty() {
                    write(format!("seed-{file}-{number}"), &bytes)?;
                }
                for place in *places {
                    write(format!("seed-{file}-{number}-{place}"), &[&[*place], &bytes[..]].concat())?;
                }
            }
        }
    }
    Ok(())
}

/// The corpus of a target, which lives as long as the checkout.
fn corpus(target: &str) -> Result<std::path::PathBuf, String> {
    let dir = root().join("fuzz").join("corpus").join(target);
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(dir)
}
