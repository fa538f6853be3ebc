//! The simulator, and the campaigns that look for what it cannot have: crashes, power cuts, damaged files, mistakes on purpose.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use crate::{Outcome, USAGE, cargo, need, root, step};

/// Builds the simulator, which has a target directory of its own: tokio must decide from the seed, for which everything is built with
/// another flag. With it come the mistakes on purpose, of which none is made unless one is asked for.
fn simulator() -> Result<PathBuf, String> {
    let target = root().join("target").join("sim");
    let mut build = cargo(&["build", "--profile", "sim", "--locked", "-p", "mainstay-sim", "-p", "mainstay"]);
    // jemalloc would take a minute and a half to build, and decides nothing here.
    build
        .args(["--no-default-features", "--features", "mainstay-sim/planted,mainstay/planted", "--target-dir"])
        .arg(&target);
    step("build the simulator", build.env("RUSTFLAGS", "--cfg tokio_unstable"))?;
    Ok(target.join("sim").join("mainstay-sim"))
}

/// Runs simulated worlds: `args` are those of `mainstay-sim run`.
pub(crate) fn sim(args: &[&str]) -> Outcome {
    let mut run = Command::new(simulator()?);
    step("simulator", run.arg("run").args(args).current_dir(root()))
}

/// What a campaign does in short, as CI does, and at length.
const CAMPAIGNS: &[(&str, &str, &str, &str)] = &[
    ("kill", "--cycles", "100", "2000"),
    ("power", "--cycles", "20", "1000"),
    ("damage", "--images", "2000", "50000"),
    ("hostile", "--connections", "100", "1000"),
    ("overload", "--seconds", "3", "10"),
    ("planted", "--seeds", "4000", "20000"),
];

/// Runs a campaign: `--short` as CI does, else at length; other arguments are those of `mainstay-sim`.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let [name, rest @ ..] = args else { return Err(format!("which campaign?\n\n{USAGE}")) };
    if *name == "tests" {
        return tests(rest);
    }
    let known = CAMPAIGNS.iter().find(|(known, ..)| known == name);
    let Some((name, size, short, long)) = known else { return Err(format!("unknown campaign {name}\n\n{USAGE}")) };
    let is_short = rest.contains(&"--short");
    let mut given: Vec<&str> = rest.iter().copied().filter(|arg| *arg != "--short").collect();
    let is_given = |option: &str| rest.iter().any(|arg| arg.split('=').next() == Some(option));
    if !is_given(size) && !is_given("--bug") {
        given.extend([*size, if is_short { *short } else { *long }]);
    }
    let program = match *name {
        "planted" => simulator()?,
        // Figures are those of a release, and have to be reached.
        "hostile" | "overload" if !is_short => {
            if !is_given("--strict") {
                given.push("--strict");
            }
            // Bursts that quotas allow are a small part of that.
            if *name == "hostile" && !is_given("--seconds") {
                given.extend(["--seconds", "150"]);
            }
            step("build", &mut cargo(&["build", "--release", "--locked", "-p", "mainstay", "-p", "mainstay-sim"]))?;
            root().join("target").join("release").join("mainstay-sim")
        }
        _ => {
            // As the tests are built, so that nothing is built twice.
            step("build", &mut cargo(&["build", "--workspace", "--all-targets", "--locked"]))?;
            root().join("target").join("debug").join("mainstay-sim")
        }
    };
    step(&format!("campaign {name}"), Command::new(program).arg(name).args(given).current_dir(root()))
}

/// Repeats the randomized tests with new seeds until the time is over.
fn tests(args: &[&str]) -> Outcome {
    let seconds: u64 = match args {
        [] => 1800,
        [seconds] => seconds.parse().map_err(|_| format!("{seconds} is not a number of seconds"))?,
        _ => return Err(format!("too many arguments\n\n{USAGE}")),
    };
    need("nextest", "cargo-nextest")?;
    step("build", &mut cargo(&["build", "--workspace", "--all-targets", "--locked"]))?;
    let begun = Instant::now();
    let mut seed = u64::from(std::process::id()) << 32;
    let mut rounds = 0;
    while begun.elapsed().as_secs() < seconds {
        seed += 1;
        let mut command =
            cargo(&["nextest", "run", "--workspace", "--locked", "-E", "test(/random|crash|network|tail::/)"]);
        step(&format!("round with MAINSTAY_SEED={seed}"), command.env("MAINSTAY_SEED", seed.to_string()))?;
        rounds += 1;
    }
    eprintln!("== {rounds} rounds without a failure");
    Ok(())
}

/// What CI runs of all this.
pub(crate) fn short() -> Outcome {
    sim(&["--seeds", "500"])?;
    for (name, ..) in CAMPAIGNS {
        run(&[name, "--short"])?;
    }
    Ok(())
}
