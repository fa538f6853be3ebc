//! Many seeds, and one.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write, stderr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::simulation::{Outcome, simulate};

/// Which seeds.
#[derive(Debug, Clone, Copy)]
pub struct Seeds {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Runs seeds on all cores until they are over or `each` says no.
pub(crate) fn run_each(seeds: Seeds, each: impl Fn(Outcome) -> bool + Sync) {
    let (next, over) = (AtomicU64::new(seeds.first), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed - seeds.first >= seeds.count {
                        return;
                    }
                    if !each(simulate(seed)) {
                        over.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

/// Runs seeds, tells of each that is broken, and in the end what was provoked. True if none is broken, and everything was provoked that
/// has to be: a run in which nothing went wrong proves nothing.
pub fn run(seeds: Seeds) -> bool {
    let begun = Instant::now();
    let (done, broken) = (AtomicU64::new(0), AtomicU64::new(0));
    let counts: Mutex<BTreeMap<String, u64>> = Mutex::default();
    let differ = AtomicU64::new(0);
    run_each(seeds, |outcome| {
        if cfg!(tokio_unstable)
            && (outcome.seed - seeds.first < TWICE || outcome.seed.is_multiple_of(EACH))
            && simulate(outcome.seed).trace() != outcome.trace()
        {
            println!("seed {} is not the same twice", outcome.seed);
            differ.fetch_add(1, Ordering::Relaxed);
        }
        if !outcome.is_sound() {
            broken.fetch_add(1, Ordering::Relaxed);
            tell(&outcome);
        }
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        for (what, count) in &outcome.verdict.counts {
            *counts.entry(what.clone()).or_default() += count;
        }
        drop(counts);
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        if stderr().is_terminal() && done.is_multiple_of(50) {
            eprint!("\r{done} of {} seeds", seeds.count);
            let _ = stderr().flush();
        }
        true
    });
    let (broken, counts) = (broken.into_inner(), counts.into_inner().unwrap_or_else(PoisonError::into_inner));
    println!(
        "seeds {} to {}: {broken} broken, {:.1} s",
        seeds.first,
        seeds.first + seeds.count - 1,
        begun.elapsed().as_secs_f64()
    );
    println!("{}", counts.iter().map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", "));
    let missing: Vec<&str> =
        PROVOKED.iter().copied().filter(|what| counts.get(*what).copied().unwrap_or(0) == 0).collect();
    if !missing.is_empty() && seeds.count >= ENOUGH {
        println!("nothing of this happened, so nothing was tested: {missing:?}");
        return false;
    }
    broken == 0 && differ.into_inner() == 0
}

/// So many seeds are run twice, to see that they are the same.
const TWICE: u64 = 50;
/// And so is each one of so many.
const EACH: u64 = 10;

/// What has to happen in so many seeds.
const ENOUGH: u64 = 200;
const PROVOKED: &[&str] = &[
    "crash",
    "crash-in-recovery",
    "loss",
    "outage",
    "full-disk",
    "worn-disk",
    "failed-disk",
    "clock-jump",
    "resumes-exact",
    "resumes-gap",
    "snapshots",
    "released",
    "abandoned",
    "appends-behind-faults",
    "departures-behind-faults",
    "losses-behind-faults",
    "expiries-timed",
    "expired",
    "fenced",
    "unknown",
    "unknown-stored",
    "deduplicated",
    "gaps",
    "conflicts",
    "changes",
    "takeovers",
    "departures",
    "members",
    "forbidden",
    "lives-over",
    "views",
    "hashes-compared",
    "messages-compared",
    "batches",
    "deeds",
    "deploy",
    "leases-ended",
    "messages",
    "rot",
    "runs",
    "own-signals",
    "others-signals-forbidden",
    "stood-by",
    "torn-write",
    "zombies-fenced",
    "positions",
    "revoked",
    "told-that-it-is-revoked",
    "withheld",
    "namespaces-compared",
];

/// Runs one seed twice. True if it is sound, and the same both times.
pub fn replay(seed: u64, trace: Option<&Path>) -> bool {
    let outcome = simulate(seed);
    let again = simulate(seed);
    if let Some(path) = trace
        && let Err(error) = std::fs::write(path, outcome.trace())
    {
        eprintln!("mainstay-sim: {}: {error}", path.display());
        return false;
    }
    println!(
        "{}",
        outcome.verdict.counts.iter().map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", ")
    );
    let same = outcome.trace() == again.trace();
    if !same && cfg!(tokio_unstable) {
        println!("seed {seed} is not the same twice");
    }
    if !cfg!(tokio_unstable) {
        println!("not built for it (`cargo xtask sim` is): another run of this seed is another history");
    }
    if !outcome.is_sound() {
        tell(&outcome);
    }
    outcome.is_sound() && (same || !cfg!(tokio_unstable))
}

fn tell(outcome: &Outcome) {
    println!("seed {} is broken; alone: cargo xtask sim --seed {}", outcome.seed, outcome.seed);
    if let Some(failed) = &outcome.failed {
        println!("  {failed}");
    }
    for violation in &outcome.verdict.violations {
        println!("  {} {}: {}", violation.property, violation.class.name(), violation.what);
    }
}
