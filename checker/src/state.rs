//! K1–K4: keys, and views of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::evidence::{Evidence, Life, Operation, Outcome, Viewed, Whole};
use crate::fold::Fold;
use crate::history::{Call, Event, Record};
use crate::verdict::{Class, Verdict};

/// Checks changes of keys, and every view.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    for ((session, incarnation), life) in &evidence.lives {
        // What was given up and nobody read cannot be folded again.
        let Some(whole) = &life.whole else { continue };
        if evidence.has_one_life(session) {
            changes(evidence, session, (life, whole), verdict);
            expiries(evidence, session, life, verdict);
            accounted(evidence, session, (life, whole), verdict);
        }
        let views = evidence.views.iter().filter(|view| view.session == *session && view.incarnation == *incarnation);
        let mut hashes = BTreeMap::new();
        for attached in &evidence.attached {
            if (attached.session, attached.incarnation) == (*session, *incarnation) {
                same_hash(&mut hashes, session, attached.tail, attached.hash, attached.process, verdict);
            }
        }
        for subscription in evidence.subscriptions.values() {
            if (subscription.session, subscription.incarnation) != (*session, *incarnation) {
                continue;
            }
            for (_, event) in &subscription.events {
                if let Event::Skipped { next, hash: Some(hash), .. } = event {
                    same_hash(&mut hashes, session, *next, hash, subscription.process, verdict);
                }
            }
        }
        for complete in &life.complete {
            if let Some(hash) = complete.hash {
                same_hash(&mut hashes, session, complete.tail, hash, "what is stored", verdict);
            }
        }
        compare(session, life, views.collect(), hashes, verdict);
    }
}

/// Hash and whose it is, by seq.
type Hashes<'a> = BTreeMap<u64, (&'a str, &'a str)>;

/// K4: whoever has a view at a seq has the same.
fn same_hash<'a>(
    hashes: &mut Hashes<'a>,
    session: &str,
    at: u64,
    hash: &'a str,
    process: &'a str,
    verdict: &mut Verdict,
) {
    let (known, whose) = *hashes.entry(at).or_insert((hash, process));
    if whose != process {
        verdict.count("hashes-compared", 1);
    }
    if known != hash {
        verdict
            .report(Class::HashDivergence, session, || format!("at {at}: {process} has {hash}, and {whose} {known}"));
    }
}

/// What a key was, from which seq on.
type Versions = Vec<(u64, Option<(String, u64)>)>;

/// The versions of every key.
fn versions<'a>(records: &[&'a Record]) -> BTreeMap<&'a str, Versions> {
    let mut keys: BTreeMap<&str, Versions> = BTreeMap::new();
    let mut fold = Fold::default();
    for record in records {
        fold.add(record);
        if let Some(key) = record.key.as_deref().filter(|_| record.kind.starts_with("state.")) {
            keys.entry(key).or_default().push((record.seq, fold.state.get(key).cloned()));
        }
    }
    keys
}

/// The version in force before `seq`.
fn before(versions: &Versions, seq: u64) -> Option<&(String, u64)> {
    let count = versions.partition_point(|(from, _)| *from < seq);
    versions[..count].last().and_then(|(_, version)| version.as_ref())
}

/// K1, K2, L6: each change is stored as it was answered, was not read before it was asked for, and its condition held.
fn changes(evidence: &Evidence<'_>, session: &str, (life, whole): (&Life<'_>, &Whole<'_>), verdict: &mut Verdict) {
    let records: BTreeMap<u64, &Record> = whole.records.iter().map(|record| (record.seq, *record)).collect();
    let keys = versions(&whole.records);
    let none = Versions::new();
    let puts = whole.records.iter().filter(|record| record.kind == "state.put");
    let puts: BTreeMap<_, u64> =
        puts.map(|record| ((record.key.as_deref(), record.value.as_deref()), record.seq)).collect();
    let bounds = Bounds::of(evidence, session, whole.tail);
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let (key, expected) = match operation.call {
            Call::Put { key, expected, .. } | Call::Delete { key, expected, .. } => (key, *expected),
            Call::Increment { key, .. } => (key, None),
            _ => continue,
        };
        let versions = keys.get(key.as_str()).unwrap_or(&none);
        let wrong = |what: String| format!("operation {} {:?}: {what}", operation.op, operation.call);
        let done = match (operation.outcome, operation.call) {
            (Outcome::Done(seq), _) => seq,
            // What nobody was told of is known by its value.
            (Outcome::Unknown, Call::Put { value, .. }) => {
                puts.get(&(Some(key.as_str()), Some(value.as_str()))).copied()
            }
            _ => None,
        };
        let old = done.and_then(|seq| before(versions, seq));
        let revision = old.map_or(0, |(_, revision)| revision.saturating_add(1));
        if let (Some(seq), Some(expected)) = (done, expected.filter(|expected| *expected != revision)) {
            let what = wrong(format!("done at {seq}, where {revision} was to be expected and not {expected}"));
            verdict.report(Class::WrongChange, session, || what);
        }
        match operation.outcome {
            Outcome::Done(Some(seq)) => {
                verdict.count("changes", 1);
                let stored = records.get(&seq);
                let (kind, value) = match operation.call {
                    Call::Put { value, .. } => ("state.put", Some(value.clone())),
                    Call::Increment { by, .. } => {
                        let old = old.map_or(Some(0), |(value, _)| value.parse::<i64>().ok());
                        ("state.put", old.and_then(|old| old.checked_add(*by)).map(|sum| sum.to_string()))
                    }
                    _ => ("state.deleted", None),
                };
                let is = stored.is_some_and(|record| {
                    record.kind == kind
                        && record.key.as_ref() == Some(key)
                        && (kind != "state.put" || record.value == value)
                });
                if !is {
                    verdict.report(Class::WrongChange, session, || wrong(format!("stored as {stored:?}")));
                }
                if let Some(seen) = life.seen.get(&seq).filter(|seen| seen.at < operation.invoked) {
                    verdict.report(Class::PrecommittedRead, session, || wrong(format!("was read at {}", seen.at)));
                }
            }
            Outcome::Failed("CONFLICT") => {
                verdict.count("conflicts", 1);
                if expected.is_none_or(|expected| held_all_the_time(&bounds, operation, versions, expected)) {
                    verdict.report(Class::FalseConflict, session, || wrong("its condition held all the time".into()));
                }
            }
            _ => {}
        }
    }
}

/// K2: where no clock was set, a value that was to last so long is there for so long.
fn expiries(evidence: &Evidence<'_>, session: &str, life: &Life<'_>, verdict: &mut Verdict) {
    let mut puts: BTreeMap<(&str, &str), &Operation<'_>> = BTreeMap::new();
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        if let Call::Put { key, value, .. } = operation.call {
            puts.insert((key, value), operation);
        }
    }
    let mut values: BTreeMap<&str, &str> = BTreeMap::new();
    for (seq, seen) in &life.seen {
        match (seen.record.kind.as_str(), seen.record.key.as_deref(), seen.record.value.as_deref()) {
            ("state.put", Some(key), Some(value)) => drop(values.insert(key, value)),
            ("state.expired", Some(key), _) => {
                let put = values.remove(key).and_then(|value| puts.get(&(key, value)));
                let Some((put, lasts)) = put.and_then(|put| match put.call {
                    Call::Put { lasts: Some(lasts), .. } => Some((put, lasts)),
                    _ => None,
                }) else {
                    continue;
                };
                if evidence.has_clock_jump(put.invoked, seen.at) {
                    continue;
                }
                verdict.count("expiries-timed", 1);
                // A server counts whole milliseconds.
                if seen.at < put.invoked.saturating_add(lasts.saturating_sub(1).saturating_mul(1_000_000)) {
                    verdict.report(Class::WrongChange, session, || {
                        format!(
                            "{key}, put by operation {} for {lasts} ms, expired at seq {seq} by {}",
                            put.op, seen.at
                        )
                    });
                }
            }
            _ => {}
        }
    }
}

/// What changes of a key account for.
#[derive(Default)]
struct Account<'a> {
    /// Values that were asked for, whether each certainly was not given, and whether it lasts for ever.
    puts: BTreeMap<&'a str, (bool, bool)>,
    /// By how much somebody asked for it to grow.
    steps: BTreeSet<i64>,
    /// How often something else may have been done at least, and at most.
    increments: (u64, u64),
    deletions: (u64, u64),
    /// What deletions of which nobody knows whether they were done expected.
    expected: BTreeSet<Option<u64>>,
    /// Where deletions are that were done.
    deleted: BTreeSet<u64>,
    /// When somebody asked for one first that did not fail.
    deletion_asked: Option<u64>,
}

/// K1: each stored change is one that was asked for, once, and did not fail.
fn accounted(evidence: &Evidence<'_>, session: &str, (life, whole): (&Life<'_>, &Whole<'_>), verdict: &mut Verdict) {
    let mut keys: BTreeMap<&str, Account<'_>> = BTreeMap::new();
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let (done, may) = (u64::from(operation.is_done()), u64::from(!operation.has_failed()));
        match operation.call {
            Call::Put { key, value, lasts, .. } => {
                keys.entry(key).or_default().puts.insert(value, (operation.has_failed(), lasts.is_none()));
            }
            Call::Increment { key, by, .. } => {
                let account = keys.entry(key).or_default();
                if !operation.has_failed() {
                    account.steps.insert(*by);
                }
                let (least, most) = &mut account.increments;
                (*least, *most) = (*least + done, *most + may);
            }
            Call::Delete { key, expected, .. } => {
                let account = keys.entry(key).or_default();
                if !operation.has_failed() {
                    account.deletion_asked.get_or_insert(operation.invoked);
                }
                match (operation.outcome, operation.seq()) {
                    (Outcome::Unknown, _) => drop(account.expected.insert(*expected)),
                    (_, Some(seq)) => drop(account.deleted.insert(seq)),
                    _ => {}
                }
                let (least, most) = &mut account.deletions;
                (*least, *most) = (*least + done, *most + may);
            }
            _ => {}
        }
    }
    let mut given: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let mut counted: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    let mut sums: BTreeMap<&str, Option<i64>> = BTreeMap::new();
    // Keys whose value may go by itself.
    let mut passing: BTreeSet<&str> = BTreeSet::new();
    let mut revisions: BTreeMap<&str, u64> = BTreeMap::new();
    for record in whole.records.iter().filter(|record| record.kind.starts_with("state.")) {
        let Some(key) = record.key.as_deref() else { continue };
        let sum = record.value.as_deref().map_or(Some(0), |value| value.parse::<i64>().ok());
        let old = sums.insert(key, sum).unwrap_or(Some(0));
        let account = keys.get(key);
        let revision = match record.kind == "state.put" {
            true => revisions.insert(key, record.seq),
            false => revisions.remove(key),
        };
        let (increments, deletions) = counted.entry(key).or_default();
        match (record.kind.as_str(), record.value.as_deref()) {
            ("state.put", Some(value)) => match account.and_then(|account| account.puts.get(value)) {
                Some((failed, lasts_for_ever)) => {
                    match lasts_for_ever {
                        true => passing.remove(key),
                        false => passing.insert(key),
                    };
                    let times = given.entry((key, value)).or_default();
                    *times += 1;
                    if *times > 1 {
                        verdict.report(Class::Duplicate, session, || format!("{record:?} is there once more"));
                    }
                    if *failed {
                        verdict.report(Class::AbortedRead, session, || format!("{record:?} failed"));
                    }
                }
                None if account.is_some_and(|account| !account.steps.is_empty()) => {
                    *increments += 1;
                    let step = old.zip(sum).and_then(|(old, sum)| sum.checked_sub(old));
                    if !step.is_some_and(|step| account.is_some_and(|account| account.steps.contains(&step))) {
                        let what = || format!("{record:?}, behind {old:?}, is no step that was asked for");
                        verdict.report(Class::WrongChange, session, what);
                    }
                }
                None => verdict.report(Class::Phantom, session, || format!("{record:?}")),
            },
            ("state.deleted", _) => {
                passing.remove(key);
                *deletions += 1;
                let asked = account.and_then(|account| account.deletion_asked);
                if asked > life.seen.get(&record.seq).map(|seen| seen.at) {
                    let what = || format!("{record:?}, which was asked for first at {asked:?}");
                    verdict.report(Class::PrecommittedRead, session, what);
                }
                let held = Some(revision.map_or(0, |revision| revision.saturating_add(1)));
                let may = |account: &Account<'_>| account.expected.contains(&None) || account.expected.contains(&held);
                // One that nobody asked for is counted below; of one that was answered the condition is looked at where it is answered.
                let unknown =
                    |account: &&Account<'_>| !account.expected.is_empty() && !account.deleted.contains(&record.seq);
                if account.filter(unknown).is_some_and(|account| !may(account)) {
                    let what = || format!("{record:?}, where {held:?} was to be expected, and nobody did");
                    verdict.report(Class::WrongChange, session, what);
                }
            }
            ("state.expired", _) => {
                verdict.count("expired", 1);
                if !passing.remove(key) {
                    let what = || format!("{record:?}, and what it was given was to last");
                    verdict.report(Class::WrongChange, session, what);
                }
            }
            _ => {}
        }
    }
    for (key, account) in &keys {
        let (increments, deletions) = counted.get(key).copied().unwrap_or_default();
        for (what, times, (least, most)) in
            [("increments", increments, account.increments), ("deletions", deletions, account.deletions)]
        {
            if times > most {
                verdict.report(Class::Duplicate, session, || {
                    format!("{what} of {key}: {times}, and at most {most} were done")
                });
            }
            if times < least {
                verdict
                    .report(Class::LostWrite, session, || format!("{what} of {key}: {times}, and {least} were done"));
            }
        }
    }
}

/// Between which seqs an operation can have been decided.
struct Bounds {
    /// When something was answered, and the latest seq that was until then.
    answered: Vec<(u64, u64)>,
    /// When something was asked for, and the earliest seq of what was from then on.
    asked: Vec<(u64, u64)>,
    tail: u64,
}

impl Bounds {
    fn of(evidence: &Evidence<'_>, session: &str, tail: u64) -> Self {
        let records =
            evidence.operations.iter().filter(|other| other.call.session() == session && other.call.is_record());
        let done: Vec<_> = records.filter_map(|other| Some((other.invoked, other.returned, other.seq()?))).collect();
        let mut answered: Vec<(u64, u64)> = done.iter().map(|(_, returned, seq)| (*returned, *seq)).collect();
        let mut asked: Vec<(u64, u64)> = done.iter().map(|(invoked, _, seq)| (*invoked, *seq)).collect();
        answered.sort_unstable();
        asked.sort_unstable();
        let mut latest = 0;
        for (_, seq) in &mut answered {
            latest = latest.max(*seq);
            *seq = latest;
        }
        let mut earliest = tail;
        for (_, seq) in asked.iter_mut().rev() {
            earliest = earliest.min(*seq);
            *seq = earliest;
        }
        Self { answered, asked, tail }
    }

    /// From just behind what was there before it was asked for, to just before what was asked for after it was answered.
    fn decided(&self, operation: &Operation<'_>) -> (u64, u64) {
        let before = self.answered.partition_point(|(returned, _)| *returned < operation.invoked);
        let after = self.asked.partition_point(|(invoked, _)| *invoked <= operation.returned);
        let low = self.answered[..before].last().map_or(0, |(_, seq)| seq.saturating_add(1));
        (low, self.asked.get(after).map_or(self.tail, |(_, seq)| *seq))
    }
}

/// True if this was to be expected of the key at every seq at which the operation can have been decided.
fn held_all_the_time(bounds: &Bounds, operation: &Operation<'_>, versions: &Versions, expected: u64) -> bool {
    let (low, high) = bounds.decided(operation);
    let to_expect =
        |version: Option<&(String, u64)>| version.map_or(0, |(_, revision)| revision.saturating_add(1)) == expected;
    let from = versions.partition_point(|(seq, _)| *seq < low);
    // Of a history that contradicts itself nothing is between.
    let to = versions.partition_point(|(seq, _)| *seq < high).max(from);
    to_expect(before(versions, low)) && versions[from..to].iter().all(|(_, version)| to_expect(version.as_ref()))
}

/// K3, P1: each view is the fold of its log.
fn compare<'a>(
    session: &str,
    life: &Life<'_>,
    mut views: Vec<&Viewed<'a>>,
    mut hashes: Hashes<'a>,
    verdict: &mut Verdict,
) {
    views.sort_by_key(|view| view.next);
    let mut fold = Fold::default();
    let mut records = life.seen.values().map(|seen| seen.record).peekable();
    // The next seq, and whether parts are missing that nobody saw before they were put together: then texts are known again behind the whole.
    let (mut due, mut apart) = (0, false);
    for Viewed { process, next, view, .. } in views {
        while let Some(record) = records.next_if(|record| record.seq < *next) {
            apart |= record.seq > due;
            apart &= record.kind != "message.replace";
            due = record.seq.saturating_add(1);
            fold.add(record);
        }
        verdict.count("views", 1);
        let at = |what: String| format!("the view of {process} at {next}: {what}");
        if view.state != fold.state {
            verdict.report(Class::StateDivergence, session, || at(format!("{:?}, not {:?}", view.state, fold.state)));
        }
        if view.members != fold.members {
            verdict.report(Class::PresenceDivergence, session, || {
                at(format!("{:?}, not {:?}", view.members, fold.members))
            });
        }
        // Old ones are let go of.
        for (id, text) in view.messages.iter().filter(|_| !apart && due == *next) {
            verdict.count("messages-compared", 1);
            if fold.messages.get(id) != Some(text) {
                verdict.report(Class::MessageDivergence, session, || {
                    at(format!("{id}: {text:?}, not {:?}", fold.messages.get(id)))
                });
            }
        }
        let bytes: usize = fold.messages.values().map(String::len).sum();
        if !apart && due == *next && fold.messages.len() <= KEPT_MESSAGES && bytes <= KEPT_BYTES {
            for (id, text) in fold.messages.iter().filter(|(id, _)| !view.messages.contains_key(*id)) {
                verdict.report(Class::MessageDivergence, session, || at(format!("{id} is not in it: {text:?}")));
            }
        }
        if let Some(hash) = &view.hash {
            same_hash(&mut hashes, session, *next, hash, process, verdict);
        }
    }
}

/// So many messages a view keeps at least (registry, `kept_messages`), with so many bytes together (`kept_message_bytes`).
const KEPT_MESSAGES: usize = 100;
const KEPT_BYTES: usize = 1 << 20;
