//! Mistakes on purpose: each has to be found by the campaign that is there for its like.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use mainstay_protocol::planted::{Bug, plant};

use crate::crashes::{self, Campaign, How};
use crate::seeds::{Seeds, run_each};
use crate::simulation::{self, said};
use crate::{damage, power};

/// What is to find a bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hunter {
    Simulator,
    Power,
    Damage,
    FailedSync,
}

impl Hunter {
    /// A simulated disk has none of the mistakes of a real engine.
    fn of(bug: Bug) -> Self {
        match bug {
            Bug::AckBeforeSync | Bug::WitnessBeforeSync => Self::Power,
            Bug::WitnessIgnored => Self::Damage,
            Bug::SyncErrorIgnored => Self::FailedSync,
            _ => Self::Simulator,
        }
    }
}

/// What finds it: one of these words is in what is told of the first seed that does. A client that is told what cannot be says so itself, and
/// may be sooner than the checker.
fn expected(bug: Bug) -> &'static [&'static str] {
    const TOLD_WRONG: &str = "Protocol(";
    match bug {
        Bug::AckBeforeSync | Bug::WitnessBeforeSync => &["was acknowledged"],
        Bug::ShownBeforeDurable => &["epoch-reused", "lost-write", "vanished", "inconsistent-seq", "stale-read"],
        Bug::DirtyRefusal => &["false-conflict"],
        Bug::DedupForgotten => &["duplicate", "lost-write"],
        Bug::LateFence => &["ACK of a batch", "unfenced-write", "lost-write"],
        Bug::EpochInMemory => &["epoch-reused"],
        Bug::HalfBatch => &["torn-batch", "lost-write", TOLD_WRONG],
        Bug::LeaveWithoutGeneration => &["late-leave"],
        Bug::OverlayKept => &["wrong-change", "false-conflict"],
        Bug::CatchUpOffByOne | Bug::TrimTooFar => &["skipped-delivery", "hole"],
        Bug::LiveOffByOne | Bug::SwallowedGap => &["skipped-delivery", TOLD_WRONG],
        Bug::ResumeOffByOne => &["wrong-resume"],
        Bug::PrefixWithoutBorder => &["unauthorized"],
        Bug::KindsIgnored => &["filter-leaked"],
        Bug::DeletionNotFolded => &["state-divergence"],
        Bug::CaughtUpTooEarly => &["stale-read", "nonmonotonic-read"],
        Bug::RunNeverFenced => &["zombie-write"],
        Bug::TakenFromHolder => &["two-holders"],
        Bug::IncrementOverDurable | Bug::ConditionIgnored => &["wrong-change"],
        Bug::UnknownIsLost | Bug::UnknownToldAsFailed => &["aborted-read"],
        Bug::UnknownIsStored => &["inconsistent-seq", "epoch-reused", "lost-write"],
        Bug::LeaseOnWallClock | Bug::MembersForgotten => &["ghost"],
        Bug::TakenForStored => &["lost-write"],
        Bug::SentUnderNewSequence => &["SEQ_GAP", "duplicate"],
        Bug::NeverSentAgain => &["not done in time"],
        Bug::CompactionLosesPart => &["message-divergence", "lost-write", "phantom"],
        Bug::IncarnationIgnored => &["mixed-timelines"],
        Bug::WitnessIgnored => &["missing in silence"],
        Bug::SyncErrorIgnored => &["was acknowledged"],
    }
}

/// How a bug was found.
enum Found {
    By(String),
    Nothing,
    /// It cannot be looked for here.
    Skipped(String),
    /// Something else went wrong.
    Failed(String),
}

/// The first of so many seeds that finds a bug, and what it finds. Without the bug it has to be sound.
fn simulate(bug: Bug, first: u64, seeds: u64) -> Found {
    let found: Mutex<Option<(u64, String)>> = Mutex::default();
    plant(Some(bug));
    run_each(Seeds { first, count: seeds }, |outcome| {
        let sound = outcome.is_sound();
        if !sound {
            let classes = outcome.verdict.broken.keys().map(|class| class.name());
            let failed = outcome.failed.iter().map(|failed| failed.lines().next().unwrap_or_default().to_owned());
            let how: Vec<String> = classes.filter(|class| class != "nothing-provoked").chain(failed).collect();
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            if found.as_ref().is_none_or(|(seed, _)| outcome.seed < *seed) {
                *found = Some((outcome.seed, how.join(", ")));
            }
        }
        sound
    });
    plant(None);
    match found.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((seed, _)) if !simulation::simulate(seed).is_sound() => {
            Found::Failed(format!("seed {seed} is not sound without it either"))
        }
        Some((seed, how)) => Found::By(format!("simulator, seed {seed}: {how}")),
        None => Found::Nothing,
    }
}

fn cut_power(bug: Bug, seed: u64) -> Found {
    let temp = tempfile::tempdir().expect("a directory");
    if let Err(why) = power::Disk::make(temp.path()) {
        return Found::Skipped(why);
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let campaign = |cycles, planted| Campaign { how: How::Power, cycles, seed, planted };
    if !runtime.block_on(crashes::run(campaign(10, None))) {
        return Found::Failed("power cuts are not survived without it either".into());
    }
    let campaign = campaign(60, Some(bug.name()));
    // A server that refuses to start makes it panic.
    match catch_unwind(AssertUnwindSafe(|| runtime.block_on(crashes::run(campaign)))) {
        Ok(true) => Found::Nothing,
        Ok(false) => Found::By("power cuts: the checker".into()),
        Err(panic) => match said(panic.as_ref()) {
            why if why.starts_with("the server refused to start") => Found::By(format!("power cuts: {why}")),
            why => Found::Failed(why),
        },
    }
}

/// Plants every bug, one after the other, with at most so many seeds for each. True if each was found.
pub fn hunt(seeds: u64, first: u64, only: Option<Bug>) -> bool {
    let (mut missed, mut found_all, mut skipped) = (0, 0, 0);
    let bugs = Bug::ALL.iter().filter(|bug| only.is_none_or(|only| only == **bug));
    for bug in bugs {
        let found = match Hunter::of(*bug) {
            Hunter::Simulator => simulate(*bug, first, seeds),
            Hunter::Power => cut_power(*bug, first + 1),
            Hunter::Damage => {
                let sound = damage::run(2000, first + 1);
                plant(Some(*bug));
                let silent = !damage::run(2000, first + 1);
                plant(None);
                match (sound, silent) {
                    (false, _) => Found::Failed("damage is not always noticed without it either".into()),
                    (true, true) => Found::By("damaged files: acknowledged data is missing in silence".into()),
                    (true, false) => Found::Nothing,
                }
            }
            Hunter::FailedSync => {
                let runtime = tokio::runtime::Runtime::new().expect("a runtime");
                // It has to be the bug that is found.
                let without = runtime.block_on(crashes::failed_sync(None));
                match (without, runtime.block_on(crashes::failed_sync(Some(bug.name())))) {
                    (Err(why), _) if why.starts_with("strace") => Found::Skipped(why),
                    (Err(why), _) => Found::Failed(format!("a failed sync, without it: {why}")),
                    (Ok(()), Ok(())) => Found::Nothing,
                    (Ok(()), Err(why)) => Found::By(format!("a failed sync: {why}")),
                }
            }
        };
        match found {
            Found::By(how) if expected(*bug).iter().any(|expected| how.contains(expected)) => {
                println!("{:<26} {}", bug.name(), how.chars().take(150).collect::<String>());
                found_all += 1;
            }
            Found::By(how) => {
                println!("{:<26} FAILED: not by {:?}, but {how}", bug.name(), expected(*bug));
                missed += 1;
            }
            Found::Nothing => {
                println!("{:<26} NOT FOUND", bug.name());
                missed += 1;
            }
            Found::Failed(why) => {
                println!("{:<26} FAILED: {why}", bug.name());
                missed += 1;
            }
            Found::Skipped(why) => {
                mainstay_tests::skipped(&format!("planted bug {}", bug.name()), &why);
                skipped += 1;
            }
        }
    }
    println!("{found_all} found, {missed} not found, {skipped} skipped");
    missed == 0
}
