//! `mainstay-sim`: simulated worlds, and campaigns against the real binary.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mainstay_sim::crashes::{self, Campaign, How};
use mainstay_sim::damage;
use mainstay_sim::hostile::{self, Hostile, Overload};
use mainstay_sim::seeds::{self, Seeds};
use mainstay_tests::attack::Way;

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
        #[arg(long, default_value_t = 500, value_parser = at_least_one())]
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
    /// Kill the real server again and again, at random moments and system calls, also while it starts, and check what is left.
    Kill {
        #[command(flatten)]
        campaign: Crashes,
    },
    /// Cut the power under the real server again and again, and check what is left. Needs root, loop devices, mkfs.ext4 and perl.
    Power {
        #[command(flatten)]
        campaign: Crashes,
    },
    /// Damage copies of a data directory, and look whether it is reported or harmless.
    Damage {
        /// How many.
        #[arg(long, default_value_t = 2000, value_parser = at_least_one())]
        images: u64,
        /// Decides everything random; a new one if there is none.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Attack the real server from many connections beside honest ones, and look whether those notice.
    Hostile {
        /// Hostile connections at once.
        #[arg(long, default_value_t = 100, value_parser = at_least_one())]
        connections: u64,
        /// For how long.
        #[arg(long, default_value_t = 20, value_parser = at_least_one())]
        seconds: u64,
        /// Honest sessions.
        #[arg(long, default_value_t = 50, value_parser = at_least_one())]
        honest: u64,
        /// This way of attacking alone; may be repeated.
        #[arg(long)]
        only: Vec<Way>,
        /// Fail if honest clients are slowed down to more than twice: for a release build on a machine that does nothing else.
        #[arg(long)]
        strict: bool,
        /// Attack another server beside the one of the honest clients: what the machine itself does to them.
        #[arg(long)]
        elsewhere: bool,
        /// Decides everything random; a new one if there is none.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// The attackers of `hostile`.
    #[command(hide = true)]
    Attack {
        /// What they are to do.
        orders: PathBuf,
    },
    /// Write five and ten times as much as the real server can take, and look what it gets done and what is lost.
    Overload {
        /// How long each is measured.
        #[arg(long, default_value_t = 5, value_parser = at_least_one())]
        seconds: u64,
        /// Sessions that saturate it.
        #[arg(long, default_value_t = 16, value_parser = at_least_one())]
        sessions: u64,
        /// How many times as many there are then, one after the other.
        #[arg(long, value_delimiter = ',', default_values_t = [5, 10], value_parser = at_least_one())]
        times: Vec<u64>,
        /// Fail if less than nine tenths of the peak are done: for a release build on a machine that does nothing else.
        #[arg(long)]
        strict: bool,
    },
    /// Make each mistake on purpose, and look which seed finds it.
    #[cfg(feature = "planted")]
    Planted {
        /// At most so many seeds for each.
        #[arg(long, default_value_t = 4000, value_parser = at_least_one())]
        seeds: u64,
        /// The first of them; power cuts and damage are decided by it too.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// This one alone.
        #[arg(long)]
        bug: Option<mainstay_protocol::planted::Bug>,
    },
}

/// A campaign of nothing would be sound.
fn at_least_one() -> impl clap::builder::TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(1..)
}

#[derive(clap::Args)]
struct Crashes {
    /// How often.
    #[arg(long, default_value_t = 100, value_parser = at_least_one())]
    cycles: u64,
    /// Decides everything random; a new one if there is none.
    #[arg(long)]
    seed: Option<u64>,
}

impl Crashes {
    fn run(&self, how: How) -> bool {
        let seed = self.seed.unwrap_or_else(mainstay_tests::random::seed);
        block_on(crashes::run(Campaign { how, cycles: self.cycles, seed, planted: None })).is_sound()
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "off".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let sound = match Args::parse().what {
        What::Kill { campaign } => campaign.run(How::Kill),
        What::Hostile { connections, seconds, honest, only, strict, elsewhere, seed } => {
            let seed = seed.unwrap_or_else(mainstay_tests::random::seed);
            block_on(hostile::run(&Hostile { connections, honest, seconds, only, seed, strict, elsewhere }))
        }
        What::Attack { orders } => {
            block_on(hostile::strike(&orders));
            true
        }
        What::Overload { seconds, sessions, times, strict } => {
            block_on(hostile::overload(Overload { sessions, times, seconds, strict }))
        }
        What::Damage { images, seed } => {
            damage::run(images, seed.unwrap_or_else(mainstay_tests::random::seed)).is_sound()
        }
        What::Power { campaign } => campaign.run(How::Power),
        #[cfg(feature = "planted")]
        What::Planted { seeds, seed, bug } => mainstay_sim::planted::hunt(seeds, seed, bug),
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
