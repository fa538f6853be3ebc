//! L1–L9: what is stored.

use std::collections::{BTreeMap, BTreeSet};

use crate::evidence::{Evidence, Life, Operation, Outcome, is_part};
use crate::fold::Fold;
use crate::history::{Call, Record};
use crate::verdict::{Class, Verdict};

/// An append.
struct Append<'a> {
    operation: &'a Operation<'a>,
    producer: &'a str,
    sequence: u64,
    records: &'a [String],
    stream: Option<&'a str>,
    run: Option<&'a str>,
}

/// Checks all appends and all that was seen of them.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let mut appends: BTreeMap<&str, Vec<Append<'_>>> = BTreeMap::new();
    for operation in &evidence.operations {
        if let Call::Append { session, producer, sequence, records, stream, run, .. } = operation.call {
            let (sequence, stream, run) = (*sequence, stream.as_deref(), run.as_deref());
            let append = Append { operation, producer, sequence, records, stream, run };
            appends.entry(session).or_default().push(append);
        }
    }
    let deleted: BTreeSet<&str> = evidence.deletions().collect();
    lives(evidence, verdict);
    let sessions: BTreeSet<&str> =
        appends.keys().copied().chain(evidence.lives.keys().map(|(name, _)| *name)).collect();
    for session in sessions {
        let appends = appends.get(session).map_or(&[][..], Vec::as_slice);
        stored(evidence, session, appends, deleted.contains(session), verdict);
        read_whole(evidence, session, deleted.contains(session), verdict);
        realtime(evidence, session, deleted.contains(session), verdict);
        if evidence.lives_of(session).count() == 1 && !deleted.contains(session) {
            for (_, life) in evidence.lives_of(session) {
                for records in wholes(life) {
                    messages(evidence, session, &records, verdict);
                }
                if let Some(whole) = &life.whole {
                    deeds(evidence, session, &whole.records, verdict);
                }
            }
        }
        for (_, life) in evidence.lives_of(session) {
            complete(evidence, session, life, verdict);
            times(session, life, verdict);
        }
    }
}

/// Every complete read that begins at the first record; where all begin later, what readers saw of the session together, if they saw it as it
/// was written.
fn wholes<'a>(life: &Life<'a>) -> Vec<Vec<&'a Record>> {
    let from_the_first = life.complete.iter().filter(|complete| complete.first == 0);
    let read: Vec<_> = from_the_first.map(|complete| complete.records.iter().collect()).collect();
    match &life.whole {
        Some(whole) if read.is_empty() && !life.compacted => vec![whole.records.clone()],
        _ => read,
    }
}

/// L9: nobody goes on in a life of a session that is over.
fn lives(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let over = |session: &str, incarnation: &str, before: u64| {
        let begun = evidence.lives.get(&(session, incarnation)).map(|life| life.begun);
        let mut deleted = evidence.operations.iter().filter(|operation| {
            let is = matches!(operation.call, Call::DeleteSession { session: of } if of == session);
            is && operation.is_done()
                && begun.is_some_and(|begun| begun < operation.returned && operation.returned < before)
        });
        deleted.next().is_some()
    };
    for operation in &evidence.operations {
        let Call::AttachAt { session, incarnation } = operation.call else { continue };
        if !over(session, incarnation, operation.invoked) {
            continue;
        }
        match operation.is_done() {
            true => verdict.report(Class::MixedTimelines, session, || {
                format!("operation {} goes on in {incarnation}, which was deleted before", operation.op)
            }),
            false => verdict.count("lives-over", 1),
        }
    }
}

/// L1, L9: whatever was acknowledged is looked for, and a session has another life only if somebody deleted the one before.
fn read_whole(evidence: &Evidence<'_>, session: &str, deleted: bool, verdict: &mut Verdict) {
    if deleted {
        return;
    }
    let mut lives = evidence.lives_of(session);
    if let (Some(((_, one), _)), Some(((_, other), _))) = (lives.next(), lives.next()) {
        verdict.report(Class::MixedTimelines, session, || format!("it is {one} and {other}, and nobody deleted it"));
    }
    let told = evidence.operations.iter().any(|of| of.call.session() == session && of.stored().is_some());
    if told && evidence.lives_of(session).all(|(_, life)| life.complete.is_empty()) {
        let what = || "something was acknowledged, and nobody read it as a whole at the end".into();
        verdict.report(Class::NothingProvoked, session, what);
    }
}

/// Where each text is stored, in which life.
type Places<'a> = BTreeMap<&'a str, Vec<(&'a str, u64, u64)>>;

/// L1, L2, L3, L6, L8: what is stored is what was appended.
fn stored(evidence: &Evidence<'_>, session: &str, appends: &[Append<'_>], deleted: bool, verdict: &mut Verdict) {
    let mut places: Places<'_> = BTreeMap::new();
    for ((_, incarnation), life) in evidence.lives_of(session) {
        for (seq, seen) in &life.seen {
            if let (Some(text), "data") = (&seen.record.data, seen.record.kind.as_str()) {
                places.entry(text).or_default().push((incarnation, *seq, seen.at));
            }
        }
    }
    let read = evidence.lives_of(session).any(|(_, life)| !life.complete.is_empty());
    // A complete read that begins behind it has a hole there; of what was given up nothing is known unless all of it was seen.
    let all_seen = evidence.has_one_life(session) && evidence.lives_of(session).all(|(_, life)| life.whole.is_some());
    let first = if all_seen { 0 } else { evidence.given_up(session) };
    let lasts = evidence.lasts_from(session);
    let mut invoked: BTreeSet<&str> = BTreeSet::new();
    let mut order: BTreeMap<(&str, &str), Vec<(u64, u64)>> = BTreeMap::new();
    let (mut authors, mut processes): (BTreeMap<&str, &str>, BTreeMap<&str, &str>) = Default::default();
    for append in appends {
        let Append { operation, producer, sequence, records, stream, run } = append;
        let texts = || format!("operation {} of {}: {records:?}", operation.op, operation.process);
        let found: Vec<Option<(&str, u64, u64)>> =
            records.iter().map(|text| places.get(text.as_str()).and_then(|all| all.first().copied())).collect();
        invoked.extend(records.iter().map(String::as_str));
        for (incarnation, seq, _) in found.iter().flatten() {
            let Some(seen) = evidence.lives.get(&(session, *incarnation)).and_then(|life| life.seen.get(seq)) else {
                continue;
            };
            // A process is one client, which the server knows by one name, and nobody else by that.
            let author = *authors.entry(operation.process).or_insert(&seen.record.author);
            let process = *processes.entry(&seen.record.author).or_insert(operation.process);
            if author != seen.record.author || process != operation.process {
                verdict.report(Class::Phantom, session, || {
                    format!(
                        "seq {seq} is under {}, who is {process}, and not under {author}: {}",
                        seen.record.author,
                        texts()
                    )
                });
            }
            let stored = (stream.map(|_| seen.record.stream.as_str()), seen.record.run.as_deref());
            if stored != (*stream, *run) {
                verdict.report(Class::LostWrite, session, || {
                    format!("seq {seq} is of stream and run {stored:?} and not of {stream:?} and {run:?}: {}", texts())
                });
            }
        }
        for (text, all) in records.iter().filter_map(|text| Some((text, places.get(text.as_str())?))) {
            if all.len() > 1 {
                verdict.report(Class::Duplicate, session, || format!("{text:?} is stored at {all:?}"));
            }
            if all.iter().any(|(.., at)| *at < operation.invoked) {
                verdict.report(Class::PrecommittedRead, session, || format!("{text:?}: {}", texts()));
            }
        }
        match operation.outcome {
            Outcome::Done(seq) => {
                verdict.count("acknowledged", records.len() as u64);
                // Somebody read it, then something happened, and then it was acknowledged: it was sent twice, and is there once.
                if let Some((_, _, seen)) = found.iter().flatten().next() {
                    let between = evidence.provoked.partition_point(|at| at <= seen);
                    let twice = evidence.provoked.get(between).is_some_and(|at| *at < operation.returned);
                    verdict.count("deduplicated", u64::from(twice));
                }
                let Some(seq) = seq else {
                    verdict.report(Class::Malformed, session, || format!("{} has no seq", texts()));
                    continue;
                };
                // Of a session that was deleted, or in a part that was given up, nothing has to be there.
                for (index, found) in found.iter().enumerate() {
                    let place = seq.saturating_add(index as u64);
                    match found {
                        None if read && operation.invoked >= lasts && place >= first => {
                            verdict.report(Class::LostWrite, session, || format!("seq {place}: {}", texts()));
                        }
                        Some((_, at, _)) if *at != place => {
                            verdict.report(Class::LostWrite, session, || {
                                format!("acknowledged as seq {place}, stored at {at}: {}", texts())
                            });
                        }
                        _ => {}
                    }
                }
            }
            Outcome::Failed(code) => {
                verdict.count("refused", 1);
                if found.iter().any(Option::is_some) {
                    verdict.report(Class::AbortedRead, session, || format!("refused with {code}: {}", texts()));
                }
            }
            Outcome::Unknown => {
                verdict.count("unknown", 1);
                verdict.count("unknown-stored", u64::from(found.iter().any(Option::is_some)));
            }
        }
        let there: Vec<(&str, u64, u64)> = found.iter().copied().flatten().collect();
        let whole = found.len() == there.len()
            && there.windows(2).all(|pair| pair[1].1 == pair[0].1.saturating_add(1) && pair[1].0 == pair[0].0);
        // Its beginning may have been given up.
        let cut = deleted || first > 0 && there.iter().any(|(_, seq, _)| *seq <= first);
        if records.len() > 1 {
            verdict.count("batches", 1);
            // One that was lost whole is told above; of one that a reader had begun to read nothing is known behind.
            if read && !there.is_empty() && !whole && !cut {
                verdict.report(Class::TornBatch, session, || format!("at {there:?}: {}", texts()));
            }
        }
        if let Some((_, seq, _)) = there.first().filter(|_| !deleted) {
            order.entry((producer, operation.process)).or_default().push((*sequence, *seq));
        }
    }
    for ((producer, process), mut batches) in order {
        batches.sort_unstable();
        for pair in batches.windows(2) {
            if pair[1].1 <= pair[0].1 {
                verdict.report(Class::Reorder, session, || {
                    format!("{process} through {producer}: sequences and seqs {:?} before {:?}", pair[0], pair[1])
                });
            }
        }
    }
    for (text, all) in &places {
        if !invoked.contains(text) {
            verdict.report(Class::Phantom, session, || format!("{text:?} at {all:?}"));
        }
    }
}

/// L1, L2, L6: what messages say is what was written, all of it once that was acknowledged, and its end where it was said; whether it was put
/// together or not.
fn messages(evidence: &Evidence<'_>, session: &str, records: &[&Record], verdict: &mut Verdict) {
    let mut fold = Fold::default();
    let mut bounds: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for record in records {
        fold.add(record);
        if let (Some(message), "message.start" | "message.end") = (&record.message, record.kind.as_str()) {
            let times = bounds.entry((message, &record.kind)).or_default();
            *times += 1;
            if *times > 1 {
                verdict.report(Class::Duplicate, session, || format!("{record:?} is there once more"));
            }
        }
    }
    let mut written: BTreeSet<&str> = BTreeSet::new();
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let Call::Speak { message, text, .. } = operation.call else { continue };
        written.insert(message);
        verdict.count("messages", 1);
        let stored = fold.messages.get(message);
        let told = || format!("operation {} wrote {text:?} as {message}, and {stored:?} is stored", operation.op);
        let ends = |record: &Record| record.kind == "message.end" && record.message.as_ref() == Some(message);
        let end = records.iter().find(|record| ends(record));
        if operation.is_done() && (stored != Some(text) || end.map(|end| end.seq) != operation.seq()) {
            verdict.report(Class::LostWrite, session, told);
        }
        if let Some(status) = end.and_then(|end| end.status.as_deref()).filter(|status| *status != "complete") {
            verdict.report(Class::LostWrite, session, || format!("{message} was ended as complete, and is {status}"));
        }
        if operation.has_failed() && end.is_some() {
            verdict.report(Class::AbortedRead, session, told);
        }
        if stored.is_some_and(|stored| !text.starts_with(stored)) {
            verdict.report(Class::Phantom, session, told);
        }
    }
    for (message, text) in &fold.messages {
        if !text.is_empty() && !written.contains(message.as_str()) {
            verdict.report(Class::Phantom, session, || format!("message {message} says {text:?}, which nobody wrote"));
        }
    }
}

/// L1, L6: memberships and runs are in the log where it was said, and nobody's who did not ask for them.
fn deeds(evidence: &Evidence<'_>, session: &str, records: &[&Record], verdict: &mut Verdict) {
    let mut asked: BTreeSet<(&str, &str)> = BTreeSet::new();
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let (kind, whose) = match operation.call {
            Call::Join { author, .. } => ("presence.joined", author),
            Call::StartRun { run, .. } | Call::TakeRun { run, .. } => ("run.start", run),
            Call::EndRun { run, .. } => ("run.end", run),
            _ => continue,
        };
        if !operation.has_failed() {
            asked.insert((kind, whose));
        }
        done_at(operation, records, |record| deed(record) == Some((kind, whose)), verdict);
    }
    for record in records {
        if deed(record).is_some_and(|deed| !asked.contains(&deed)) {
            verdict.report(Class::Phantom, session, || format!("{record:?}, which nobody asked for"));
        }
    }
}

/// L1: what was done is where that was said.
pub(crate) fn done_at(
    operation: &Operation<'_>,
    records: &[&Record],
    is: impl Fn(&Record) -> bool,
    verdict: &mut Verdict,
) {
    let Some(seq) = operation.stored() else { return };
    verdict.count("deeds", 1);
    let stored = records.binary_search_by_key(&seq, |record| record.seq).ok().map(|at| records[at]);
    if !stored.is_some_and(is) {
        verdict.report(Class::LostWrite, operation.call.session(), || {
            format!("operation {} {:?} was done at {seq}, where {stored:?} is", operation.op, operation.call)
        });
    }
}

/// Which membership or run a record is about that somebody asks for.
fn deed(record: &Record) -> Option<(&str, &str)> {
    let kind = record.kind.as_str();
    match kind {
        "presence.joined" => Some((kind, &record.author)),
        "run.start" | "run.end" => Some((kind, record.run.as_deref()?)),
        _ => None,
    }
}

/// L5, K1: what was asked for after something was acknowledged is behind it.
fn realtime(evidence: &Evidence<'_>, session: &str, deleted: bool, verdict: &mut Verdict) {
    // Each life counts anew.
    if deleted {
        return;
    }
    let stored = |operation: &&Operation<'_>| operation.call.session() == session && operation.call.is_record();
    let operations: Vec<&Operation<'_>> = evidence.operations.iter().filter(stored).collect();
    let mut answered: Vec<(u64, u64, u64)> =
        operations.iter().filter_map(|operation| Some((operation.returned, operation.seq()?, operation.op))).collect();
    answered.sort_unstable();
    let mut answered = answered.into_iter().peekable();
    let mut latest = None;
    for operation in operations {
        while let Some((_, seq, op)) = answered.next_if(|(returned, ..)| *returned < operation.invoked) {
            latest = latest.max(Some((seq, op)));
        }
        let Some(seq) = operation.place() else { continue };
        if let Some((before, op)) = latest.filter(|(before, _)| *before >= seq) {
            verdict.report(Class::RealtimeLag, session, || {
                format!(
                    "operation {} is at {seq}, and {op}, answered before it was asked for, at {before}",
                    operation.op
                )
            });
        }
    }
}

/// L4, L7: no holes, and what was delivered stays.
fn complete(evidence: &Evidence<'_>, session: &str, life: &Life<'_>, verdict: &mut Verdict) {
    let given_up = evidence.given_up(session);
    for complete in &life.complete {
        if complete.first > given_up {
            verdict.report(Class::Hole, session, || {
                format!("kept from {} on, and nobody gave up more than what is below {given_up}", complete.first)
            });
        }
        let mut next = complete.first;
        if let Some(record) =
            complete.records.iter().find(|record| !(complete.first..complete.tail).contains(&record.seq))
        {
            verdict.report(Class::Malformed, session, || {
                format!("a complete read from {} to {} has {record:?}", complete.first, complete.tail)
            });
        }
        for record in complete.records {
            // A part that was put together is in another one.
            let passed =
                |seq: u64| complete.compacted && life.seen.get(&seq).is_none_or(|seen| is_part(&seen.record.kind));
            if record.seq < next || (next..record.seq).any(|seq| !passed(seq)) {
                verdict.report(Class::Hole, session, || format!("{} follows where {next} is due", record.seq));
            }
            next = record.seq.saturating_add(1);
        }
        if next < complete.tail && !complete.compacted {
            verdict.report(Class::Hole, session, || format!("nothing from {next} to the tail {}", complete.tail));
        }
        let there: BTreeSet<u64> = complete.records.iter().map(|record| record.seq).collect();
        // What any complete read has, every other has too.
        for (seq, seen) in life.seen.range(complete.first..) {
            let put_together = complete.compacted && is_part(&seen.record.kind);
            if !there.contains(seq) && !put_together {
                verdict.report(Class::Vanished, session, || {
                    format!("{:?}, seen in subscription {:?}", seen.record, seen.subscription)
                });
            }
        }
    }
}

/// L5: within a session time never runs backwards, whatever the clock does; also where messages were put together.
fn times(session: &str, life: &Life<'_>, verdict: &mut Verdict) {
    let told = life.seen.values().filter_map(|seen| Some((seen.record.time.as_deref()?, seen.record)));
    let mut latest: Option<(&str, &Record)> = None;
    for (time, record) in told {
        verdict.count("times", 1);
        match latest {
            Some((before, earlier)) if before > time => {
                verdict.report(Class::TimeRanBackwards, session, || format!("{record:?} stands behind {earlier:?}"));
            }
            _ => latest = Some((time, record)),
        }
    }
}
