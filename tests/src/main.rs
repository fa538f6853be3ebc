//! `mainstay-tests proxy`: the UDP fault proxy on its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::{Parser, Subcommand};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_tests::recording::Recording;
use tokio::signal::unix::{SignalKind, signal};

/// Tools of Mainstay's whole-system tests.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    tool: Tool,
}

#[derive(Subcommand)]
enum Tool {
    /// Relay UDP and make the network bad, from a seed. Prints what it did when it is stopped with Ctrl-C.
    Proxy {
        /// Server to relay to.
        #[arg(long, value_name = "ADDR:PORT")]
        upstream: SocketAddr,
        /// Where clients connect to.
        #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Milliseconds that each direction takes.
        #[arg(long, default_value_t = 0)]
        delay_ms: u64,
        /// Up to so many milliseconds more.
        #[arg(long, default_value_t = 0)]
        jitter_ms: u64,
        /// Percent of datagrams that are lost.
        #[arg(long, default_value_t = 0.0)]
        loss: f64,
        /// Percent of datagrams that begin a burst of lost ones.
        #[arg(long, default_value_t = 0.0)]
        burst: f64,
        /// Datagrams of a burst.
        #[arg(long, default_value_t = 10)]
        burst_length: u32,
        /// Percent of datagrams that arrive out of order.
        #[arg(long, default_value_t = 0.0)]
        reorder: f64,
        /// Percent of datagrams that arrive twice.
        #[arg(long, default_value_t = 0.0)]
        duplicate: f64,
        /// Bits per second in each direction; 0 for no limit.
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// Bytes that may wait for the rate.
        #[arg(long, default_value_t = 65_536)]
        queue: u64,
        /// Longest datagram; 0 for no limit.
        #[arg(long, default_value_t = 0)]
        mtu: usize,
        /// Give every flow another address each so many seconds; 0 for never.
        #[arg(long, default_value_t = 0)]
        rebind_every: u64,
        /// Lose everything for `--blackhole-secs`, each so many seconds; 0 for never.
        #[arg(long, default_value_t = 0)]
        blackhole_every: u64,
        /// How long everything is lost.
        #[arg(long, default_value_t = 5)]
        blackhole_secs: u64,
        /// Seed of everything random.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Write what became of each datagram to this file at the end.
        #[arg(long, value_name = "FILE")]
        record: Option<PathBuf>,
        /// Do what was recorded in this file, datagram by datagram, as long as it says something.
        #[arg(long, value_name = "FILE")]
        replay: Option<PathBuf>,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let Tool::Proxy {
        upstream,
        listen,
        delay_ms,
        jitter_ms,
        loss,
        burst,
        burst_length,
        reorder,
        duplicate,
        rate,
        queue,
        mtu,
        rebind_every,
        blackhole_every,
        blackhole_secs,
        seed,
        record,
        replay,
    } = Args::parse().tool;
    let faults = Faults {
        delay: Duration::from_millis(delay_ms),
        jitter: Duration::from_millis(jitter_ms),
        loss: loss / 100.0,
        burst: burst / 100.0,
        burst_length,
        reorder: reorder / 100.0,
        duplicate: duplicate / 100.0,
        rate: rate / 8,
        queue,
        mtu,
    };
    let replayed = replay.map_or_else(|| Ok(Recording::default()), |path| Recording::read(&path));
    let proxy = match replayed.map(|recording| Proxy::replay(listen, upstream, faults, seed, recording)) {
        Ok(Ok(proxy)) => proxy,
        Ok(Err(error)) => {
            eprintln!("mainstay-tests: cannot listen on {listen}: {error}");
            return ExitCode::FAILURE;
        }
        Err(error) => {
            eprintln!("mainstay-tests: cannot replay: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("listening on {}, relaying to {upstream}, seed {seed}", proxy.addr());
    let Ok(mut terminated) = signal(SignalKind::terminate()) else { return ExitCode::FAILURE };
    let mut turn = 0u8;
    let (mut rebinds, mut blackholes) = (each(rebind_every), each(blackhole_every));
    loop {
        tokio::select! {
            _ = rebinds.tick() => {
                turn = turn % 200 + 1;
                proxy.rebind([127, 0, 0, turn].into());
            }
            _ = blackholes.tick() => {
                proxy.blackhole(true);
                tokio::time::sleep(Duration::from_secs(blackhole_secs)).await;
                proxy.blackhole(false);
            }
            _ = tokio::signal::ctrl_c() => break,
            _ = terminated.recv() => break,
        }
    }
    if let Some(path) = record
        && let Err(error) = proxy.recording().write(&path)
    {
        eprintln!("mainstay-tests: {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    let counts = proxy.counts();
    let read = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    println!(
        "passed {}, lost {}, duplicated {}, reordered {}, rebound {}",
        read(&counts.passed),
        read(&counts.lost),
        read(&counts.duplicated),
        read(&counts.reordered),
        read(&counts.rebound)
    );
    ExitCode::SUCCESS
}

/// Ticks every `seconds`, from then on; never for 0.
fn each(seconds: u64) -> tokio::time::Interval {
    let every = Duration::from_secs(if seconds == 0 { u64::from(u32::MAX) } else { seconds });
    tokio::time::interval_at(tokio::time::Instant::now() + every, every)
}
