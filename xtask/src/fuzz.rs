//! Fuzzing with cargo-fuzz, which needs a nightly toolchain.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::{Outcome, has, need, root, skipped, step};

/// Seconds for each target in the smoke run.
const SMOKE: &str = "30";
/// Targets that run at once there.
const AT_ONCE: usize = 4;
/// Executions of each parser in the long run.
const LONG: u64 = 100_000_000;
/// Targets that are one parser each, of bytes from a peer or a disk. The others drive a part with many steps in each input.
const PARSERS: &[&str] = &[
    "backup_read",
    "chunk_decode",
    "deframer",
    "frame_decode",
    "frame_roundtrip",
    "journal_check",
    "records",
    "resume_token",
    "token_read",
];

/// Runs the targets as the arguments say.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let targets = targets()?;
    let (chosen, seconds): (Vec<String>, &str) = match args {
        ["--smoke"] => (targets, SMOKE),
        ["--long"] => (PARSERS.iter().map(|name| known(name, &targets)).collect::<Result<_, _>>()?, ""),
        ["--long", target] => (vec![known(target, &targets)?], ""),
        ["--coverage" | "--minimise"] => (targets, ""),
        ["--coverage" | "--minimise", target] => (vec![known(target, &targets)?], ""),
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
    unpack(&chosen)?;
    dictionary()?;
    match args.first() {
        Some(&"--coverage") => return coverage(&chosen),
        Some(&"--long") => return long(&chosen),
        Some(&"--minimise") => return chosen.iter().try_for_each(|target| minimise(target)),
        _ => {}
    }
    // Built once: two that run at once would wait for each other.
    step("build the fuzz targets", nightly_cargo().args(["fuzz", "build"]))?;
    if args == ["--smoke"] {
        return chosen.chunks(AT_ONCE).try_for_each(|targets| at_once(targets, seconds));
    }
    chosen.iter().try_for_each(|target| step(&format!("fuzz {target} for {seconds} s"), &mut fuzz(target, seconds)?))
}

/// Executes each target so often that rare inputs come, one after the other. Without a sanitizer, which costs much of the speed: our code has
/// nothing that it could find, and the smoke run has it for the libraries.
fn long(targets: &[String]) -> Outcome {
    let dir = root().join("target").join("fuzz-long");
    for target in targets {
        let mut command = nightly_cargo();
        command.args(["fuzz", "run", "--sanitizer", "none", "--target-dir"]).arg(&dir).arg(target);
        on_inputs(&mut command, target)?.arg(format!("-runs={LONG}"));
        step(&format!("fuzz {target}, {LONG} executions"), &mut command)?;
    }
    Ok(())
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
    command.args(["fuzz", "run", target]);
    on_inputs(&mut command, target)?.arg(format!("-max_total_time={seconds}"));
    Ok(command)
}

/// On which inputs and words a run of a target goes, and how large and slow one may be.
fn on_inputs<'a>(command: &'a mut Command, target: &str) -> Result<&'a mut Command, String> {
    // New inputs go into the first.
    command.arg(corpus(target)?).args(kept(target)).args(["--", "-rss_limit_mb=1024", "-timeout=10"]);
    let own = root().join("fuzz").join("dictionaries").join(format!("{target}.dict"));
    let words = if READS_NUMBERS.contains(&target) { numbers() } else { own };
    if words.is_file() {
        command.arg(format!("-dict={}", words.display()));
    }
    Ok(command)
}

/// The inputs of a target that are in the repository one by one, if there are some.
fn kept(target: &str) -> Option<PathBuf> {
    Some(root().join("fuzz").join("seeds").join(target)).filter(|dir| dir.is_dir())
}

/// The dictionary of the registry's numbers.
fn numbers() -> PathBuf {
    root().join("fuzz").join("corpus").join("numbers.dict")
}

/// Targets that read bytes with such numbers in them.
const READS_NUMBERS: &[&str] = &[
    "chunk_decode",
    "client_connection",
    "deframer",
    "frame_decode",
    "frame_roundtrip",
    "records",
    "server_connection",
];

/// Makes a dictionary of the registry: the type of each frame, the kind of each record, the id of each parameter and the code of each
/// error, as varints.
fn dictionary() -> Outcome {
    let path = root().join("spec").join("registry.toml");
    let registry = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut words = String::new();
    for line in registry.lines() {
        let Some((name, value)) = line.split_once('=') else { continue };
        let Some(digits) = value.split("0x").nth(1) else { continue };
        let digits = digits.split(|digit: char| !digit.is_ascii_hexdigit()).next().unwrap_or_default();
        let Ok(number) = u64::from_str_radix(digits, 16) else { continue };
        // Of one byte, or of two.
        let varint = if number < 0x40 {
            format!("\\x{number:02x}")
        } else {
            format!("\\x{:02x}\\x{:02x}", 0x40 | number >> 8, number & 0xff)
        };
        let name: String =
            name.trim().chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '_' }).collect();
        words.push_str(&format!("{name}=\"{varint}\"\n"));
    }
    let path = numbers();
    fs::write(&path, words).map_err(|error| format!("{}: {error}", path.display()))
}

/// Says how many lines of the core the inputs of targets reach.
fn coverage(targets: &[String]) -> Outcome {
    // Before anything is built for them.
    let (profdata, cov) = (llvm("llvm-profdata")?, llvm("llvm-cov")?);
    let mut objects = Vec::new();
    let mut profiles = Vec::new();
    for target in targets {
        let is_empty = fs::read_dir(corpus(target)?).is_ok_and(|mut inputs| inputs.next().is_none());
        if is_empty && kept(target).is_none() {
            // What is driven by choices, and reads no bytes that a vector could be one of, finds its own.
            step(&format!("inputs of {target}"), &mut fuzz(target, "60")?)?;
        }
        let mut command = nightly_cargo();
        command.args(["fuzz", "coverage", target]).arg(corpus(target)?).args(kept(target));
        step(&format!("coverage of {target}"), &mut command)?;
        let fuzz = root().join("fuzz");
        profiles.push(fuzz.join("coverage").join(target).join("coverage.profdata"));
        let triple = host()?;
        objects.push(root().join("target").join(&triple).join("coverage").join(&triple).join("release").join(target));
    }
    let merged = root().join("target").join("fuzz.profdata");
    let mut merge = Command::new(profdata);
    step("merge", merge.arg("merge").arg("-sparse").args(&profiles).arg("-o").arg(&merged))?;
    let mut report = Command::new(cov);
    report.arg("report").arg(format!("-instr-profile={}", merged.display()));
    report.arg("-ignore-filename-regex=(protocol/src/(testing|planted)|/rustc/|/registry/)");
    for (at, object) in objects.iter().enumerate() {
        if at > 0 {
            report.arg("-object");
        }
        report.arg(object);
    }
    let report = report.arg("-sources").arg(root().join("protocol").join("src")).output();
    let report = report.map_err(|error| format!("llvm-cov: {error}"))?;
    let text = String::from_utf8_lossy(&report.stdout);
    print!("{text}");
    if !report.status.success() {
        return Err(format!("llvm-cov: {}", String::from_utf8_lossy(&report.stderr)));
    }
    // Regions, functions and lines, each with how many there are, how many are missed, and the share.
    let total = text.lines().find(|line| line.starts_with("TOTAL"));
    let lines = total.and_then(|total| total.split_whitespace().nth(9)?.trim_end_matches('%').parse::<f64>().ok());
    match lines {
        // Of one target alone it is told what that one reaches.
        Some(lines) if lines >= COVERED || targets.len() == 1 => Ok(()),
        Some(lines) => Err(format!("{lines} % of the lines of protocol/ are reached, and {COVERED} % have to be")),
        None => Err(format!("llvm-cov: {}", String::from_utf8_lossy(&report.stderr))),
    }
}

/// So much of the core, in hundredths of its lines, the inputs of all targets reach together.
const COVERED: f64 = 90.0;

/// Keeps of all inputs that a target has those that reach something that no other one does: in the repository, as one archive.
fn minimise(target: &str) -> Outcome {
    let less = root().join("fuzz").join("corpus").join(format!("{target}-less"));
    let _ = fs::remove_dir_all(&less);
    fs::create_dir_all(&less).map_err(|error| format!("{}: {error}", less.display()))?;
    let mut merge = nightly_cargo();
    merge.args(["fuzz", "run", target]).arg(&less).arg(corpus(target)?).args(kept(target));
    step(&format!("minimise {target}"), merge.args(["--", "-set_cover_merge=1", "-max_len=65536"]))?;
    let mut pack = Command::new("tar");
    pack.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-czf"]);
    step(&format!("keep {target}"), pack.arg(archive(target)).arg("-C").arg(&less).arg("."))
}

/// What long campaigns found, minimised.
fn archive(target: &str) -> PathBuf {
    root().join("fuzz").join("seeds").join(format!("{target}.tar.gz"))
}

/// Puts what was kept of each target into its corpus.
fn unpack(targets: &[String]) -> Outcome {
    for target in targets.iter().filter(|target| archive(target).is_file()) {
        let mut tar = Command::new("tar");
        let status = tar.arg("-xzf").arg(archive(target)).arg("-C").arg(corpus(target)?).status();
        if !status.is_ok_and(|status| status.success()) {
            return Err(format!("{} cannot be unpacked", archive(target).display()));
        }
    }
    Ok(())
}

/// A tool of the nightly toolchain, which gets it if it is missing.
fn llvm(name: &str) -> Result<PathBuf, String> {
    let output = Command::new("rustc").args(["+nightly", "--print", "sysroot"]).output();
    let output = output.map_err(|error| format!("rustc: {error}"))?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let tool = sysroot.join("lib").join("rustlib").join(host()?).join("bin").join(name);
    if !tool.is_file() {
        eprintln!("== installing llvm-tools, which are missing");
        // Where that fails it is said below.
        let _ = Command::new("rustup").args(["component", "add", "llvm-tools", "--toolchain", "nightly"]).status();
    }
    if tool.is_file() {
        return Ok(tool);
    }
    Err(format!("{} is missing; `rustup component add llvm-tools --toolchain nightly` installs it", tool.display()))
}

/// The triple of this machine.
fn host() -> Result<String, String> {
    let output = Command::new("rustc").args(["+nightly", "-vV"]).output().map_err(|error| format!("rustc: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = said.lines().find_map(|line| line.strip_prefix("host: ")).map(str::to_owned);
    host.ok_or_else(|| "rustc does not say what machine this is".to_owned())
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
    let uses: [(&str, Uses); 5] = [
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
        ("backups.toml", &[("backup_read", &[])]),
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
fn corpus(target: &str) -> Result<PathBuf, String> {
    let dir = root().join("fuzz").join("corpus").join(target);
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(dir)
}
