//! `mainstay-sim`: runs simulated worlds.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use mainstay_sim::simulation::{Outcome, simulate};

/// Simulated worlds, one for each seed: what goes wrong in them, and whether every promise was kept.
#[derive(Parser)]
struct Args {
    /// How many seeds, from `--first` on.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Runs one seed alone.
    #[arg(long)]
    seed: Option<u64>,
    /// Writes the history of the seed that runs alone to this file.
    #[arg(long, value_name = "FILE", requires = "seed")]
    trace: Option<std::path::PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    if let Some(seed) = args.seed {
        let outcome = simulate(seed);
        if let Some(path) = &args.trace
            && let Err(error) = std::fs::write(path, outcome.trace())
        {
            eprintln!("mainstay-sim: {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        println!("{:?}", outcome.verdict.counts);
        return if tell(&outcome) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let begun = Instant::now();
    let (next, broken) = (AtomicU64::new(args.first), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= args.first + args.seeds {
                        return;
                    }
                    if !tell(&simulate(seed)) {
                        broken.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    println!(
        "{} seeds in {:.1} s, {} broken",
        args.seeds,
        begun.elapsed().as_secs_f64(),
        broken.load(Ordering::Relaxed)
    );
    if broken.into_inner() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tell(outcome: &Outcome) -> bool {
    if outcome.is_sound() {
        return true;
    }
    println!("seed {}: {:?} {:#?}", outcome.seed, outcome.failed, outcome.verdict.violations);
    false
}
