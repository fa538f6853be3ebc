//! Mistakes on purpose: each has to be found by the campaign that is there for its like.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use mainstay_checker::verdict::Class;
use mainstay_protocol::planted::{Bug, plant};
use mainstay_tests::disk::Disk;

use crate::crashes::{self, Campaign, DISK, How};
use crate::damage;
use crate::findings::Findings;
use crate::seeds::{Seeds, run_each};
use crate::simulation::{self, said};

/// How many damaged images have to show a mistake: one of fifty does.
const IMAGES: u64 = 500;

/// What is to find a bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hunter {
    Simulator,
    Kill,
    Power,
    Damage,
    FailedSync,
}

impl Hunter {
    /// A simulated disk has none of the mistakes of a real engine. What a kill shows is found by the simulator too, in less time: two such mistakes
    /// show that crashes of the real server do find what there is to be found.
    fn of(bug: Bug) -> &'static [Self] {
        match bug {
            Bug::AckBeforeSync | Bug::WitnessBeforeSync => &[Self::Power],
            Bug::WitnessIgnored => &[Self::Damage],
            Bug::SyncErrorIgnored => &[Self::FailedSync],
            Bug::DedupForgotten | Bug::HalfBatch => &[Self::Simulator, Self::Kill],
            _ => &[Self::Simulator],
        }
    }
}

/// What tells of a bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sign {
    /// The checker, of the history.
    Class(Class),
    /// Somebody in it, in these words.
    Text(&'static str),
}

impl Sign {
    fn is_in(self, findings: &Findings) -> bool {
        match self {
            Self::Class(class) => findings.classes.contains(&class),
            Self::Text(text) => findings.texts.iter().any(|told| told.contains(text)),
        }
    }
}

/// What a client says that is told what cannot be: in words, or as it is shown to programmers.
const BROKEN: [&str; 2] = ["the server broke the protocol", "Protocol(ProtocolError"];

/// What finds it: one of these. A client that is told what cannot be says so itself, and may be sooner than the checker.
fn expected(bug: Bug) -> &'static [Sign] {
    use Class::*;
    use Sign::{Class as C, Text as T};
    const TOLD_WRONG: Sign = T(BROKEN[1]);
    match bug {
        Bug::AckBeforeSync | Bug::WitnessBeforeSync => &[T("was acknowledged"), C(LostWrite)],
        Bug::ShownBeforeDurable => &[C(EpochReused), C(LostWrite), C(Vanished), C(InconsistentSeq), C(StaleRead)],
        Bug::DirtyRefusal => &[C(FalseConflict)],
        Bug::DedupForgotten => &[C(Duplicate), C(LostWrite)],
        Bug::LateFence => &[T("ACK of a batch"), C(UnfencedWrite), C(LostWrite)],
        Bug::EpochInMemory => &[C(EpochReused)],
        Bug::HalfBatch => &[C(TornBatch), C(LostWrite), TOLD_WRONG],
        Bug::LeaveWithoutGeneration => &[C(LateLeave)],
        Bug::OverlayKept => &[C(WrongChange), C(FalseConflict)],
        Bug::CatchUpOffByOne | Bug::TrimTooFar => &[C(SkippedDelivery), C(Hole)],
        Bug::LiveOffByOne | Bug::SwallowedGap => &[C(SkippedDelivery), TOLD_WRONG],
        Bug::ResumeOffByOne => &[C(WrongResume)],
        Bug::PrefixWithoutBorder => &[C(Unauthorized)],
        Bug::KindsIgnored => &[C(FilterLeaked)],
        Bug::DeletionNotFolded => &[C(StateDivergence)],
        Bug::CaughtUpTooEarly => &[C(StaleRead), C(NonmonotonicRead)],
        Bug::RunNeverFenced => &[C(ZombieWrite)],
        Bug::TakenFromHolder => &[C(TwoHolders)],
        Bug::IncrementOverDurable | Bug::ConditionIgnored => &[C(WrongChange)],
        Bug::UnknownIsLost | Bug::UnknownToldAsFailed => &[C(AbortedRead)],
        Bug::UnknownIsStored => &[C(InconsistentSeq), C(EpochReused), C(LostWrite)],
        Bug::LeaseOnWallClock | Bug::MembersForgotten => &[C(Ghost)],
        Bug::NamespaceIgnored => &[C(CrossedNamespaces)],
        Bug::RevocationLate => &[C(RevokedDelivery)],
        Bug::TakenForStored => &[C(LostWrite)],
        Bug::SentUnderNewSequence => &[T("SEQ_GAP"), C(Duplicate)],
        Bug::NeverSentAgain => &[T("not done in time")],
        Bug::CompactionLosesPart => &[C(MessageDivergence), C(LostWrite), C(Phantom)],
        Bug::IncarnationIgnored => &[C(MixedTimelines)],
        Bug::NeverWoken => &[C(Lagging)],
        Bug::FirstKindAlone => &[C(FilterMissed)],
        Bug::PositionTooFar => &[C(WrongPosition)],
        Bug::GraceTooShort => &[C(MissingMember)],
        Bug::BegunAgain => &[C(EndedTwice)],
        Bug::PrefixWithoutName => &[C(WronglyRefused)],
        Bug::CaughtUpWithAnything => &[C(FalseCaughtUp)],
        Bug::NewestFirst => &[C(Reorder)],
        Bug::DepartureNotFolded => &[C(PresenceDivergence)],
        Bug::DigestKept => &[C(HashDivergence)],
        Bug::TimeRunsBackwards => &[C(TimeRanBackwards)],
        Bug::DeliveredTwice => &[C(Redelivered)],
        Bug::OthersSignalled | Bug::SubjectWithoutBorder => &[C(Unauthorized)],
        Bug::OwnRefused => &[C(WronglyRefused)],
        Bug::WitnessIgnored => &[T("is missing, and verify is silent"), T("nothing says so")],
        Bug::SyncErrorIgnored => &[T("was acknowledged")],
    }
}

/// How a bug was found.
enum Found {
    By(String, Findings),
    Nothing,
    /// It cannot be looked for here.
    Skipped(String),
    /// Something else went wrong.
    Failed(String),
}

/// The first of so many seeds that finds a bug as it is expected to be found. Without the bug it has to be sound.
fn simulate(bug: Bug, first: u64, seeds: u64) -> Found {
    let (as_expected, otherwise): (Mutex<Option<(u64, Findings)>>, _) = (Mutex::default(), Mutex::default());
    plant(Some(bug));
    run_each(Seeds { first, count: seeds }, |outcome| {
        let mut findings = Findings::of(&outcome.verdict);
        findings.classes.retain(|class| *class != Class::NothingProvoked);
        findings.texts.extend(outcome.failed);
        let is_found = expected(bug).iter().any(|sign| sign.is_in(&findings));
        if !findings.is_sound() {
            let found = if is_found { &as_expected } else { &otherwise };
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            if found.as_ref().is_none_or(|(seed, _)| outcome.seed < *seed) {
                *found = Some((outcome.seed, findings));
            }
        }
        !is_found
    });
    plant(None);
    let as_expected = as_expected.into_inner().unwrap_or_else(PoisonError::into_inner);
    let otherwise = || otherwise.into_inner().unwrap_or_else(PoisonError::into_inner);
    match as_expected.or_else(otherwise) {
        Some((seed, _)) if !simulation::simulate(seed).is_sound() => {
            Found::Failed(format!("seed {seed} is not sound without it either"))
        }
        Some((seed, findings)) => Found::By(format!("simulator, seed {seed}"), findings),
        None => Found::Nothing,
    }
}

fn cut_power(bug: Bug, seed: u64) -> Found {
    let temp = tempfile::tempdir().expect("a directory");
    if let Err(why) = Disk::make(temp.path(), DISK) {
        return Found::Skipped(why);
    }
    crash("power cuts", How::Power, 60, bug, seed)
}

/// Crashes of the real server, so many with the bug.
fn crash(what: &str, how: How, cycles: u64, bug: Bug, seed: u64) -> Found {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let campaign = |cycles, planted| Campaign { how, cycles, seed, planted };
    if !runtime.block_on(crashes::run(campaign(10, None))).is_sound() {
        return Found::Failed(format!("{what} are not survived without it either"));
    }
    let campaign = campaign(cycles, Some(bug.name()));
    // A server that refuses to start makes it panic, and so does a writer that is told what cannot be.
    match catch_unwind(AssertUnwindSafe(|| runtime.block_on(crashes::run(campaign)))) {
        Ok(findings) => found(what, findings),
        Err(panic) => match said(panic.as_ref()) {
            why if why.starts_with("the server refused to start") || BROKEN.iter().any(|said| why.contains(said)) => {
                found(what, Findings::told(why))
            }
            why => Found::Failed(why),
        },
    }
}

fn found(whence: &str, findings: Findings) -> Found {
    if findings.is_sound() { Found::Nothing } else { Found::By(whence.to_owned(), findings) }
}

/// Plants every bug, one after the other, with at most so many seeds for each. True if each was found.
pub fn hunt(seeds: u64, first: u64, only: Option<Bug>) -> bool {
    let (mut missed, mut found_all, mut skipped) = (0, 0, 0);
    let bugs = Bug::ALL.iter().filter(|bug| only.is_none_or(|only| only == **bug));
    for (bug, hunter) in bugs.flat_map(|bug| Hunter::of(*bug).iter().map(move |hunter| (bug, hunter))) {
        let found = match hunter {
            Hunter::Simulator => simulate(*bug, first, seeds),
            Hunter::Kill => crash("kills", How::Kill, 20, *bug, first + 1),
            Hunter::Power => cut_power(*bug, first + 1),
            Hunter::Damage => {
                let sound = damage::run(IMAGES, first + 1).is_sound();
                plant(Some(*bug));
                let findings = damage::run(IMAGES, first + 1);
                plant(None);
                match sound {
                    true => found("damaged files", findings),
                    false => Found::Failed("damage is not always noticed without it either".into()),
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
                    (Ok(()), Err(why)) => found("a failed sync", Findings::told(why)),
                }
            }
        };
        match found {
            // Writers of the real server end with what they are told.
            Found::By(whence, findings)
                if expected(*bug).iter().any(|sign| sign.is_in(&findings))
                    || (*hunter == Hunter::Kill && BROKEN.iter().any(|said| Sign::Text(said).is_in(&findings))) =>
            {
                println!("{:<26} {whence}: {}", bug.name(), findings.in_short());
                found_all += 1;
            }
            Found::By(whence, findings) => {
                println!(
                    "{:<26} FAILED: not by {:?}, but {whence}: {}",
                    bug.name(),
                    expected(*bug),
                    findings.in_short()
                );
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
