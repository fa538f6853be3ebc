//! Fuzzing with cargo-fuzz, which needs a nightly toolchain.

use std::fs;
use std::process::{Command, Stdio};

use crate::{Outcome, has, need, root, skipped, step};

/// Seconds for each target in the smoke run.
const SMOKE: &str = "30";
/// Targets that run at once there.
const AT_ONCE: usize = 4;

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
    // Built once: two that run at once would wait for each other.
    step("build the fuzz targets", nightly_cargo().args(["fuzz", "build"]))?;
    if args == ["--smoke"] {
        return chosen.chunks(AT_ONCE).try_for_each(|targets| at_once(targets, seconds));
    }
    chosen.iter().try_for_each(|target| step(&format!("fuzz {target} for {seconds} s"), &mut fuzz(target, seconds)?))
}

/// Runs targets beside each other, and shows what one said that failed.
fn at_once(targets: &[String], seconds: &str) -> Outcome {
    let begun = targets.iter().map(|target| {
        let running = fuzz(target, seconds)?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let running = running.map_err(|error| format!("fuzz {target}: {error}"))?;
        Ok((target, std::thread::spawn(move || running.wait_with_output())))
    });
    let begun: Result<Vec<_>, String> = begun.collect();
    for (target, running) in begun? {
        let output = running.join().map_err(|_| format!("fuzz {target}: cannot be waited for"))?;
        let output = output.map_err(|error| format!("fuzz {target}: {error}"))?;
        if !output.status.success() {
            eprintln!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            return Err(format!("fuzz {target} failed ({})", output.status));
        }
        eprintln!("== fuzz {target} for {seconds} s: ok");
    }
    Ok(())
}

/// Cargo of the nightly toolchain.
fn nightly_cargo() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root()).arg("+nightly");
    // The nightly of the command line counts, not the toolchain of this repository.
    command.env_remove("CARGO").env_remove("RUSTC").env_remove("RUSTDOC").env("RUSTUP_TOOLCHAIN", "nightly");
    command
}

/// Runs a target for so long.
fn fuzz(target: &str, seconds: &str) -> Result<Command, String> {
    let mut command = nightly_cargo();
    // New inputs go into the first.
    command.args(["fuzz", "run", target]).arg(corpus(target)?);
    let kept = root().join("fuzz").join("seeds").join(target);
    if kept.is_dir() {
        command.arg(kept);
    }
    command.args(["--", "-rss_limit_mb=1024", "-timeout=10"]).arg(format!("-max_total_time={seconds}"));
    Ok(command)
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
