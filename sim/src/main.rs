//! `mainstay-sim`: simulated worlds, and campaigns against the real binary.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mainstay_sim::seeds::{self, Seeds};

/// Simulated worlds, one for each seed: what goes wrong in them, and whether every promise was kept.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Run worlds: as many as asked for, or the one of a seed.
    Run {
        /// How many seeds.
        #[arg(long, default_value_t = 500)]
        seeds: u64,
        /// The first of them.
        #[arg(long, default_value_t = 0)]
        first: u64,
        /// Runs the world of this seed alone, twice, and looks whether it is the same.
        #[arg(long, conflicts_with_all = ["seeds", "first"])]
        seed: Option<u64>,
        /// Writes its history to this file.
        #[arg(long, value_name = "FILE", requires = "seed")]
        trace: Option<PathBuf>,
        /// Makes a mistake on purpose: its name.
        #[cfg(feature = "planted")]
        #[arg(long, value_name = "BUG")]
        planted: Option<mainstay_protocol::planted::Bug>,
    },
    /// Make each mistake on purpose, and look which seed finds it.
    #[cfg(feature = "planted")]
    Planted {
        /// At most so many seeds for each.
        #[arg(long, default_value_t = 2000)]
        seeds: u64,
    },
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "off".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let sound = match Args::parse().what {
        #[cfg(feature = "planted")]
        What::Planted { seeds } => seeds::hunt(seeds),
        What::Run {
            seeds,
            first,
            seed,
            trace,
            #[cfg(feature = "planted")]
            planted,
        } => {
            #[cfg(feature = "planted")]
            mainstay_protocol::planted::plant(planted);
            match seed {
                Some(seed) => seeds::replay(seed, trace.as_deref()),
                None => seeds::run(Seeds { first, count: seeds }),
            }
        }
    };
    if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
