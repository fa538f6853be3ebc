//! Histories of a service that does everything right pass; each with one thing changed fails, for the right reason.

mod legal;

use std::collections::BTreeMap;

use mainstay_checker::check;
use mainstay_checker::history::{Begin, Call, Entry, Event, Record, complete as completed, read, read_dump};
use mainstay_checker::verdict::Class;

use legal::{Random, TICK, history, sides};

/// Changes one thing. False if the history has nothing to change.
type Mutation = fn(&mut Vec<Entry>, &mut Random) -> bool;

/// Every record of a session, wherever it was seen.
fn everywhere(entries: &mut [Entry], mut change: impl FnMut(&mut Record)) {
    for entry in entries {
        if let Event::Records { records, .. } | Event::Final { records, .. } = &mut entry.event {
            records.iter_mut().for_each(&mut change);
        }
    }
}

/// The record at a seq, wherever it was seen.
fn change_at(entries: &mut [Entry], seq: u64, mut change: impl FnMut(&mut Record)) {
    everywhere(entries, |record| {
        if record.seq == seq {
            change(record);
        }
    });
}

/// The indices of the entries that this holds for.
fn indices(entries: &[Entry], holds: impl Fn(&Event) -> bool) -> Vec<usize> {
    entries.iter().enumerate().filter(|(_, entry)| holds(&entry.event)).map(|(index, _)| index).collect()
}

/// One of them.
fn pick(entries: &[Entry], random: &mut Random, holds: impl Fn(&Event) -> bool) -> Option<usize> {
    random.pick(&indices(entries, holds))
}

/// Changes all records of a kind that are of one customer's run.
fn of_an_owned_run(entries: &mut [Entry], random: &mut Random, kind: &str, change: impl Fn(&mut Record)) -> bool {
    let run = format!("owned-{}", random.below(3));
    everywhere(entries, |record| {
        if record.kind == kind && record.run.as_ref() == Some(&run) {
            change(record);
        }
    });
    true
}

/// Lets one of the signals fail that were answered and that this holds for, by process and run.
fn refuse_a_signal(entries: &mut [Entry], random: &mut Random, which: impl Fn(&str, &str) -> bool) -> bool {
    let sent: Vec<u64> = entries
        .iter()
        .filter_map(|entry| match &entry.event {
            Event::Invoke { op, call: Call::Signal { run, .. } } if which(&entry.process, run) => Some(*op),
            _ => None,
        })
        .collect();
    let done = |event: &Event| matches!(event, Event::Ok { op, .. } if sent.contains(op));
    let Some(index) = pick(entries, random, done) else { return false };
    let Event::Ok { op, .. } = entries[index].event else { return false };
    entries[index].event = Event::Fail { op, code: "FORBIDDEN".into() };
    true
}

/// The right to do this with sessions under a prefix.
fn granted(prefix: &str, operation: &str) -> Event {
    let (prefix, operations) = (prefix.to_owned(), vec![operation.to_owned()]);
    Event::Granted { prefix, operations, namespace: String::new(), subject: String::new() }
}

fn complete(entries: &[Entry]) -> (u64, Vec<Record>) {
    let found = entries.iter().find_map(|entry| match &entry.event {
        Event::Final { tail, records, .. } => Some((*tail, records.clone())),
        _ => None,
    });
    found.expect("a complete read")
}

/// Appends that were answered: index of the answer, operation, seq, texts.
fn acknowledged(entries: &[Entry]) -> Vec<(usize, u64, u64, Call)> {
    let mut found = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let Event::Ok { op, seq: Some(seq) } = entry.event else { continue };
        let asked = entries.iter().find_map(|entry| match &entry.event {
            Event::Invoke { op: asked, call: call @ Call::Append { .. } } if *asked == op => Some(call.clone()),
            _ => None,
        });
        if let Some(call) = asked {
            found.push((index, op, seq, call));
        }
    }
    found
}

/// Operations of this sort that were done, and the seqs that were answered.
fn answered(entries: &[Entry], sort: impl Fn(&Call) -> bool) -> Vec<(u64, u64)> {
    let mut asked = Vec::new();
    let mut found = Vec::new();
    for entry in entries {
        match &entry.event {
            Event::Invoke { op, call } if sort(call) => asked.push(*op),
            Event::Ok { op, seq: Some(seq) } if asked.contains(op) => found.push((*op, *seq)),
            _ => {}
        }
    }
    found
}

fn texts(call: &Call) -> &[String] {
    match call {
        Call::Append { records, .. } => records,
        _ => &[],
    }
}

fn invoked(entries: &[Entry], op: u64) -> usize {
    let is = |event: &Event| matches!(event, Event::Invoke { op: asked, .. } if *asked == op);
    indices(entries, is)[0]
}

/// Takes the last record away from everything.
fn forget_the_last(entries: &mut Vec<Entry>, _: &mut Random) -> bool {
    let (tail, records) = complete(entries);
    let last = records.last().expect("records");
    if last.kind != "data"
        || !acknowledged(entries).iter().any(|(.., call)| texts(call).contains(last.data.as_ref().expect("text")))
    {
        return false;
    }
    for entry in entries {
        match &mut entry.event {
            Event::Records { next, records, .. } => {
                records.retain(|record| record.seq + 1 < tail);
                *next = (*next).min(tail - 1);
            }
            Event::Final { tail: end, records, .. } => {
                records.pop();
                *end -= 1;
            }
            Event::CaughtUp { tail: told, .. } => *told = (*told).min(tail - 1),
            Event::View { next, .. } => *next = (*next).min(tail - 1),
            _ => {}
        }
    }
    true
}

/// Lets one text be stored in the place of another.
fn store_twice(entries: &mut [Entry], random: &mut Random) -> bool {
    let (_, records) = complete(entries);
    let data: Vec<&Record> = records.iter().filter(|record| record.kind == "data").collect();
    let (Some(one), Some(other)) = (random.pick(&data), random.pick(&data)) else { return false };
    if one.seq == other.seq {
        return false;
    }
    everywhere(entries, |record| {
        if record.seq == one.seq {
            record.data.clone_from(&other.data);
        }
    });
    true
}

/// Lets two appends of one record each, one answered before the other was asked for, change their places. Of one producer or of two.
fn change_places(entries: &mut [Entry], random: &mut Random, same: bool) -> bool {
    let acked: Vec<_> = acknowledged(entries).into_iter().filter(|(.., call)| texts(call).len() == 1).collect();
    let mut pairs = Vec::new();
    for (first, op, seq, call) in &acked {
        for (second, other, later, behind) in &acked {
            let asked = entries[invoked(entries, *other)].at;
            let of = |index: usize, call: &Call| match call {
                Call::Append { producer, .. } => (entries[index].process.clone(), producer.clone()),
                _ => unreachable!("an append"),
            };
            if entries[*first].at < asked && (of(*first, call) == of(*second, behind)) == same {
                pairs.push((*first, *second, *seq, *later, texts(call)[0].clone(), texts(behind)[0].clone(), *op));
            }
        }
    }
    let Some((first, second, seq, later, text, behind, _)) = random.pick(&pairs) else { return false };
    for (index, place) in [(first, later), (second, seq)] {
        let Event::Ok { seq, .. } = &mut entries[index].event else { unreachable!("an answer") };
        *seq = Some(place);
    }
    let authors: Vec<(u64, String, Option<String>)> =
        complete(entries).1.into_iter().map(|record| (record.seq, record.author, record.run)).collect();
    let of = |seq: u64| authors.iter().find(|(at, ..)| *at == seq).cloned().expect("a record");
    everywhere(entries, |record| {
        let other = if record.seq == seq { (later, &behind) } else { (seq, &text) };
        if record.seq == seq || record.seq == later {
            (_, record.author, record.run) = of(other.0);
            record.data = Some(other.1.clone());
        }
    });
    true
}

/// Nobody is told what became of an operation.
fn forget_the_answer(entries: &mut [Entry], op: u64) {
    for entry in entries {
        if matches!(entry.event, Event::Ok { op: of, .. } if of == op) {
            entry.event = Event::Unknown { op };
        }
    }
}

/// Puts an entry behind another one.
fn behind(entries: &mut Vec<Entry>, index: usize, event: Event) {
    let Entry { at, process, .. } = entries[index].clone();
    entries.insert(index + 1, Entry { at, process, event });
}

/// Adds what is on the disk.
fn dumped(entries: &mut Vec<Entry>, (first, tail): (u64, u64), compacted: bool, records: Vec<Record>) {
    let at = entries.last().expect("entries").at;
    let (session, incarnation) = ("s".to_owned(), String::new());
    let event = Event::Final { session, incarnation, first, tail, compacted, hash: None, records };
    entries.push(Entry { at, process: "disk".into(), event });
}

/// The seq of a record of this kind.
fn seq_of(entries: &[Entry], random: &mut Random, kind: &str) -> Option<u64> {
    let (_, records) = complete(entries);
    let of: Vec<u64> = records.iter().filter(|record| record.kind == kind).map(|record| record.seq).collect();
    random.pick(&of)
}

/// Changes the records of one delivery.
fn deliveries(entries: &[Entry], of: impl Fn(u64) -> bool, len: usize) -> Vec<usize> {
    indices(
        entries,
        |event| matches!(event, Event::Records { subscription, records, .. } if of(*subscription) && records.len() >= len),
    )
}

/// The subscription that an event is of.
fn of_subscription(event: &Event) -> Option<u64> {
    match event {
        Event::Started { subscription, .. }
        | Event::Records { subscription, .. }
        | Event::Skipped { subscription, .. }
        | Event::CaughtUp { subscription, .. }
        | Event::Resumed { subscription, .. } => Some(*subscription),
        _ => None,
    }
}

fn is_filtered(entries: &[Entry], subscription: u64) -> bool {
    entries.iter().any(|entry| {
        matches!(&entry.event, Event::Started { subscription: of, filter, .. } if *of == subscription && !filter.is_open())
    })
}

const MUTATIONS: &[(&str, Class, Mutation)] = &[
    ("an acknowledged record is nowhere", Class::LostWrite, forget_the_last),
    ("an acknowledgement tells another place", Class::LostWrite, |entries, random| {
        let Some((index, ..)) = random.pick(&acknowledged(entries)) else { return false };
        let Event::Ok { seq: Some(seq), .. } = &mut entries[index].event else { return false };
        *seq += 1;
        true
    }),
    ("a record is stored twice", Class::Duplicate, |entries, random| store_twice(entries, random)),
    ("two appends of a producer change places", Class::Reorder, |entries, random| change_places(entries, random, true)),
    ("a clock that was set back is to be seen", Class::TimeRanBackwards, |entries, random| {
        let (_, records) = complete(entries);
        let Some(record) = random.pick(records.get(1..).unwrap_or_default()) else { return false };
        change_at(entries, record.seq, |record| record.time = Some(legal::time(0)));
        true
    }),
    ("a key is deleted on a condition that never held", Class::WrongChange, |entries, random| {
        let (_, records) = complete(entries);
        let deleted = records.iter().filter(|record| record.kind == "state.deleted");
        let keys: Vec<String> = deleted.filter_map(|record| record.key.clone()).collect();
        let Some(of) = random.pick(&keys) else { return false };
        let mut ops = Vec::new();
        for entry in &mut *entries {
            if let Event::Invoke { op, call: Call::Delete { key, expected, .. } } = &mut entry.event
                && *key == of
            {
                *expected = Some(900_000);
                ops.push(*op);
            }
        }
        // Nobody is told whether it held.
        for entry in entries {
            if let Event::Ok { op, .. } = entry.event
                && ops.contains(&op)
            {
                entry.event = Event::Unknown { op };
            }
        }
        true
    }),
    ("two appends of two producers change places", Class::RealtimeLag, |entries, random| {
        change_places(entries, random, false)
    }),
    ("a complete read has a hole", Class::Hole, |entries, random| {
        for entry in entries {
            if let Event::Final { records, .. } = &mut entry.event {
                let at = random.below(records.len() as u64 - 1) as usize;
                records.remove(at);
                return true;
            }
        }
        false
    }),
    ("the beginning is gone", Class::Hole, |entries, _| {
        for entry in entries {
            if let Event::Final { records, first, .. } = &mut entry.event {
                records.remove(0);
                *first = 1;
            }
        }
        true
    }),
    ("one reader was given another record", Class::InconsistentSeq, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |_| true, 1)) else { return false };
        let Event::Records { records, .. } = &mut entries[index].event else { return false };
        records[0].author = "somebody else".into();
        true
    }),
    ("the disk has another record", Class::InconsistentSeq, |entries, _| {
        let (tail, mut records) = complete(entries);
        records[0].stream = "elsewhere".into();
        dumped(entries, (0, tail), false, records);
        true
    }),
    ("a record that nobody appended", Class::Phantom, |entries, random| {
        let (_, records) = complete(entries);
        let data: Vec<u64> = records.iter().filter(|record| record.kind == "data").map(|record| record.seq).collect();
        let Some(seq) = random.pick(&data) else { return false };
        change_at(entries, seq, |record| {
            record.data = Some("nobody's".into());
        });
        true
    }),
    ("what failed is stored", Class::AbortedRead, |entries, random| {
        let Some((index, op, ..)) = random.pick(&acknowledged(entries)) else { return false };
        entries[index].event = Event::Fail { op, code: "OVERLOADED".into() };
        true
    }),
    ("a record is read before it is appended", Class::PrecommittedRead, |entries, random| {
        let delivered: Vec<String> = entries
            .iter()
            .filter_map(|entry| match &entry.event {
                Event::Records { records, .. } => Some(records.iter().filter_map(|record| record.data.clone())),
                _ => None,
            })
            .flatten()
            .collect();
        let seen = |call: &Call| texts(call).iter().any(|text| delivered.contains(text));
        let acked: Vec<_> = acknowledged(entries).into_iter().filter(|(.., call)| seen(call)).collect();
        let Some((_, op, ..)) = random.pick(&acked) else { return false };
        let (last, index) = (entries.last().expect("entries").at, invoked(entries, op));
        entries[index].at = last;
        true
    }),
    ("what was delivered is gone", Class::Vanished, |entries, _| {
        let delivered = entries.iter().filter_map(|entry| match &entry.event {
            Event::Records { next, records, .. } if !records.is_empty() => Some(*next),
            _ => None,
        });
        let (tail, _) = complete(entries);
        if delivered.max() != Some(tail) {
            return false;
        }
        for entry in entries {
            if let Event::Final { records, tail, .. } = &mut entry.event {
                records.pop();
                *tail -= 1;
            }
        }
        true
    }),
    ("a batch has another record inside", Class::TornBatch, |entries, random| {
        let acked: Vec<_> = acknowledged(entries).into_iter().filter(|(.., call)| texts(call).len() > 2).collect();
        let Some((.., seq, _)) = random.pick(&acked) else { return false };
        everywhere(entries, |record| {
            if record.seq == seq + 1 {
                record.data = Some("somebody's".into());
            }
        });
        true
    }),
    ("a reader goes on in another life", Class::MixedTimelines, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Started { .. })) else { return false };
        let mut again = entries[index].event.clone();
        if let Event::Started { incarnation, .. } = &mut again {
            *incarnation = "another".into();
        }
        behind(entries, index, again);
        true
    }),
    ("a delivery comes again", Class::NonmonotonicDelivery, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |_| true, 1)) else { return false };
        let again = entries[index].event.clone();
        behind(entries, index, again);
        true
    }),
    ("a record comes twice in a delivery", Class::Redelivered, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |_| true, 1)) else { return false };
        let Event::Records { records, .. } = &mut entries[index].event else { return false };
        let again = records[0].clone();
        records.insert(1, again);
        true
    }),
    ("a delivery is left out", Class::SkippedDelivery, |entries, random| {
        // Followed by another one: the last one's loss is a lag, and one before a resume makes that wrong.
        let followed = |index: &usize| {
            let Event::Records { subscription, .. } = entries[*index].event else { return false };
            let later = entries[index + 1..].iter().find(|entry| of_subscription(&entry.event) == Some(subscription));
            matches!(later, Some(Entry { event: Event::Records { .. }, .. }))
        };
        let mut open = deliveries(entries, |subscription| !is_filtered(entries, subscription), 1);
        open.retain(followed);
        let Some(index) = random.pick(&open) else { return false };
        entries.remove(index);
        true
    }),
    ("a record is left out of a delivery", Class::SkippedDelivery, |entries, random| {
        let open = deliveries(entries, |subscription| !is_filtered(entries, subscription), 2);
        let Some(index) = random.pick(&open) else { return false };
        let Event::Records { records, .. } = &mut entries[index].event else { return false };
        records.remove(1);
        true
    }),
    ("a subscription goes on one further", Class::WrongResume, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |_| true, 1)) else { return false };
        let Event::Records { subscription, next, .. } = entries[index].event else { return false };
        behind(entries, index, Event::Resumed { subscription, verdict: "exact".into(), next: next + 1 });
        true
    }),
    ("a filter keeps back what passes", Class::FilterMissed, |entries, random| {
        let filtered = deliveries(entries, |subscription| is_filtered(entries, subscription), 1);
        let Some(index) = random.pick(&filtered) else { return false };
        let Event::Records { records, .. } = &mut entries[index].event else { return false };
        records.pop();
        true
    }),
    ("a filter lets through what does not pass", Class::FilterLeaked, |entries, random| {
        let filtered = deliveries(entries, |subscription| is_filtered(entries, subscription), 0);
        let Some(index) = random.pick(&filtered) else { return false };
        let (_, all) = complete(entries);
        let Event::Records { from, next, records, .. } = &mut entries[index].event else { return false };
        let others = all.iter().filter(|record| (*from..*next).contains(&record.seq) && !records.contains(record));
        let Some(other) = random.pick(&others.collect::<Vec<_>>()) else { return false };
        records.push(other.clone());
        records.sort_by_key(|record| record.seq);
        true
    }),
    ("somebody is said to have caught up too early", Class::FalseCaughtUp, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::CaughtUp { .. })) else { return false };
        let Event::CaughtUp { tail, .. } = &mut entries[index].event else { return false };
        *tail += 1;
        true
    }),
    ("a tail is told that is long over", Class::StaleRead, |entries, random| {
        let first = acknowledged(entries).first().map(|(index, ..)| entries[*index].at);
        let late =
            |event: &Event| matches!(event, Event::Started { asked, .. } if first.is_some_and(|first| *asked > first));
        let Some(index) = pick(entries, random, late) else { return false };
        let Event::Started { tail, .. } = &mut entries[index].event else { return false };
        *tail = 0;
        true
    }),
    ("a reader does not reach the end", Class::Lagging, |entries, random| {
        let (end, _) = complete(entries);
        let last = |event: &Event| matches!(event, Event::Records { next, .. } if *next == end);
        let Some(index) = pick(entries, random, last) else { return false };
        let subscription = of_subscription(&entries[index].event);
        let mut at = 0;
        entries.retain(|entry| {
            at += 1;
            at <= index || of_subscription(&entry.event) != subscription
        });
        true
    }),
    ("a fenced producer writes", Class::UnfencedWrite, |entries, random| {
        let opened = openings(entries);
        let late: Vec<_> = acknowledged(entries)
            .into_iter()
            .filter(|(_, op, _, call)| {
                let asked = entries[invoked(entries, *op)].at;
                let Call::Append { producer, epoch, .. } = call else { return false };
                *epoch > 1
                    && opened.iter().any(|(at, name, granted)| *at < asked && name == producer && granted >= epoch)
            })
            .collect();
        let Some((_, op, ..)) = random.pick(&late) else { return false };
        let index = invoked(entries, op);
        let Event::Invoke { call: Call::Append { epoch, .. }, .. } = &mut entries[index].event else { return false };
        *epoch -= 1;
        true
    }),
    ("an epoch is granted twice", Class::EpochReused, |entries, random| {
        let all = openings(entries);
        let follows = |(_, name, epoch): &(u64, String, u64)| {
            all.iter().any(|(_, other, before)| other == name && before + 1 == *epoch)
        };
        let second: Vec<_> = all.iter().filter(|opening| follows(opening)).cloned().collect();
        let Some((at, ..)) = random.pick(&second) else { return false };
        let answer = entries.iter_mut().find(|entry| entry.at == at).expect("the answer");
        let Event::Ok { seq: Some(epoch), .. } = &mut answer.event else { return false };
        *epoch -= 1;
        true
    }),
    ("a change is stored as another", Class::WrongChange, |entries, random| {
        let answered: Vec<u64> = answered(entries, |call| matches!(call, Call::Put { .. } | Call::Increment { .. }))
            .iter()
            .map(|(_, seq)| *seq)
            .collect();
        let (_, records) = complete(entries);
        let puts = records.iter().filter(|record| record.kind == "state.put" && answered.contains(&record.seq));
        let Some(seq) = random.pick(&puts.collect::<Vec<_>>()).map(|record| record.seq) else { return false };
        change_at(entries, seq, |record| {
            record.value = Some("666".into());
        });
        true
    }),
    ("a change that failed is stored", Class::AbortedRead, |entries, random| {
        let puts = answered(entries, |call| matches!(call, Call::Put { .. }));
        let Some((op, _)) = random.pick(&puts) else { return false };
        let answer = |event: &Event| matches!(event, Event::Ok { op: of, .. } if *of == op);
        let index = indices(entries, answer)[0];
        entries[index].event = Event::Fail { op, code: "OVERLOADED".into() };
        true
    }),
    ("a change is stored that nobody asked for", Class::Phantom, |entries, random| {
        let (_, records) = complete(entries);
        let puts: Vec<&Record> =
            records.iter().filter(|record| record.kind == "state.put" && record.key.as_deref() != Some("n")).collect();
        let Some(seq) = random.pick(&puts).map(|record| record.seq) else { return false };
        change_at(entries, seq, |record| {
            record.value = Some("nobody's".into());
        });
        true
    }),
    ("a number grew once more than it was asked to", Class::Duplicate, |entries, random| {
        let increments = answered(entries, |call| matches!(call, Call::Increment { .. }));
        // Of the only one nobody asked for anything.
        let Some((op, _)) = random.pick(&increments).filter(|_| increments.len() > 1) else { return false };
        let answer = |event: &Event| matches!(event, Event::Ok { op: of, .. } if *of == op);
        let index = indices(entries, answer)[0];
        entries[index].event = Event::Fail { op, code: "OVERLOADED".into() };
        true
    }),
    ("a number did not grow", Class::LostWrite, |entries, random| {
        // One that was asked for and answered, with the seq of another one.
        let increments = answered(entries, |call| matches!(call, Call::Increment { .. }));
        let Some((_, seq)) = random.pick(&increments) else { return false };
        let at = entries.last().expect("entries").at;
        let call = Call::Increment { session: "s".into(), key: "n".into(), by: 3 };
        entries.retain(|entry| !matches!(entry.event, Event::Unknown { .. }));
        for (n, event) in [
            Event::Invoke { op: 1 << 40, call: call.clone() },
            Event::Ok { op: 1 << 40, seq: Some(seq) },
            Event::Invoke { op: 2 << 40, call },
            Event::Ok { op: 2 << 40, seq: Some(seq) },
        ]
        .into_iter()
        .enumerate()
        {
            entries.push(Entry { at: at + n as u64, process: "late".into(), event });
        }
        // Those of which nobody knows whether they were done may be meant.
        let asked =
            entries.iter().filter(|entry| matches!(entry.event, Event::Invoke { call: Call::Increment { .. }, .. }));
        let done = answered(entries, |call| matches!(call, Call::Increment { .. })).len();
        asked.count() == done
    }),
    ("a gap where nothing was given up", Class::SkippedDelivery, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |_| true, 1)) else { return false };
        let Event::Records { subscription, from, next, .. } = entries[index].event else { return false };
        entries[index].event = Event::Gap { subscription, from, to: next };
        true
    }),
    ("a subscription begins elsewhere than it was asked to", Class::WrongResume, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Started { .. })) else { return false };
        let Event::Started { next, from, .. } = &mut entries[index].event else { return false };
        *from = Some(Begin::Seq(*next + 1));
        true
    }),
    ("the disk lacks what was read at the end", Class::Vanished, |entries, _| {
        let (_, mut records) = complete(entries);
        records.pop();
        let tail = records.len() as u64;
        dumped(entries, (0, tail), false, records);
        true
    }),
    ("a condition did not hold", Class::WrongChange, |entries, random| {
        let answered: Vec<u64> = entries
            .iter()
            .filter_map(|entry| if let Event::Ok { op, seq: Some(_) } = entry.event { Some(op) } else { None })
            .collect();
        let conditional = |event: &Event| matches!(event, Event::Invoke { op, call: Call::Put { expected: Some(_), .. } } if answered.contains(op));
        let Some(index) = pick(entries, random, conditional) else { return false };
        let Event::Invoke { call: Call::Put { expected, .. }, .. } = &mut entries[index].event else { return false };
        *expected = Some(expected.unwrap_or(0) + 1000);
        true
    }),
    ("a condition that held is refused", Class::FalseConflict, |entries, _| {
        let (_, records) = complete(entries);
        let Some(last) = records.iter().rfind(|record| record.kind == "state.put") else { return false };
        let key = last.key.clone().expect("a key");
        let changes = answered(entries, |call| matches!(call, Call::Put { .. } | Call::Increment { .. }));
        if !changes.iter().any(|(_, seq)| *seq == last.seq) {
            return false;
        }
        if records.iter().any(|record| record.seq > last.seq && record.key.as_ref() == Some(&key)) {
            return false;
        }
        let at = entries.last().expect("entries").at + TICK;
        let call =
            Call::Put { session: "s".into(), key, value: "late".into(), lasts: None, expected: Some(last.seq + 1) };
        // Whatever may still happen would be a reason.
        entries.retain(|entry| !matches!(entry.event, Event::Unknown { .. }));
        let process = "late".to_owned();
        entries.push(Entry { at, process: process.clone(), event: Event::Invoke { op: 1 << 40, call } });
        let event = Event::Fail { op: 1 << 40, code: "CONFLICT".into() };
        entries.push(Entry { at: at + TICK, process, event });
        true
    }),
    ("a view has another value", Class::StateDivergence, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::View { .. })) else { return false };
        let Event::View { view, .. } = &mut entries[index].event else { return false };
        view.state.insert("a".into(), ("other".into(), 7));
        true
    }),
    ("a view has another member", Class::PresenceDivergence, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::View { .. })) else { return false };
        let Event::View { view, .. } = &mut entries[index].event else { return false };
        view.members.insert("nobody".into(), 3);
        true
    }),
    ("a view has another text", Class::MessageDivergence, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::View { .. })) else { return false };
        let Event::View { view, .. } = &mut entries[index].event else { return false };
        view.messages.insert("m0".into(), "never said".into());
        true
    }),
    ("two views at one seq have two hashes", Class::HashDivergence, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::View { .. })) else { return false };
        let mut again = entries[index].event.clone();
        if let Event::View { view, .. } = &mut again {
            view.hash = Some("other".into());
        }
        behind(entries, index, again);
        true
    }),
    ("a member is there whose process is dead", Class::Ghost, |entries, random| {
        let (_, records) = complete(entries);
        let joined: Vec<&Record> = records
            .iter()
            .filter(|record| record.kind == "presence.joined")
            .filter(|record| {
                !records.iter().any(|left| left.member.as_ref() == Some(&record.author) && left.seq > record.seq)
            })
            .collect();
        let Some(author) = random.pick(&joined).map(|record| record.author.clone()) else { return false };
        let joining =
            |event: &Event| matches!(event, Event::Invoke { call: Call::Join { author: of, .. }, .. } if *of == author);
        let index = *indices(entries, joining).last().expect("somebody joined");
        behind(entries, index, Event::Gone {});
        true
    }),
    ("a member is not there that never left", Class::MissingMember, |entries, random| {
        // The last thing that it did, behind a join that was answered.
        let joined = answered(entries, |call| matches!(call, Call::Join { .. }));
        let mut last: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for entry in &*entries {
            if let Event::Invoke { op, call: Call::Join { author, .. } | Call::Leave { author, .. } } = &entry.event {
                last.entry(author.clone()).or_default().push(*op);
            }
        }
        let left = answered(entries, |call| matches!(call, Call::Leave { .. }));
        let is = |ops: &[(u64, u64)], op: u64| ops.iter().any(|(of, _)| *of == op);
        let left: Vec<u64> = last
            .values()
            .filter_map(|ops| match ops[..] {
                [.., before, leave] if is(&joined, before) && is(&left, leave) => Some(leave),
                _ => None,
            })
            .collect();
        let Some(op) = random.pick(&left) else { return false };
        entries.retain(
            |entry| !matches!(&entry.event, Event::Invoke { op: of, .. } | Event::Ok { op: of, .. } if *of == op),
        );
        true
    }),
    ("a member left under an older generation", Class::LateLeave, |entries, random| {
        let (_, records) = complete(entries);
        let left: Vec<u64> =
            records.iter().filter(|record| record.kind == "presence.left").map(|record| record.seq).collect();
        let Some(seq) = random.pick(&left) else { return false };
        change_at(entries, seq, |record| {
            record.generation = Some(1 << 30);
        });
        true
    }),
    ("another one writes for a run", Class::ZombieWrite, |entries, random| {
        let (_, records) = complete(entries);
        let parts: Vec<u64> = records
            .iter()
            .filter(|record| record.kind == "data" && record.run.is_some())
            .map(|record| record.seq)
            .collect();
        let Some(seq) = random.pick(&parts) else { return false };
        change_at(entries, seq, |record| {
            record.author = "zombie".into();
        });
        true
    }),
    ("a run is taken over from its holder", Class::TwoHolders, |entries, random| {
        let (_, records) = complete(entries);
        let lost: Vec<u64> =
            records.iter().filter(|record| record.kind == "run.lost").map(|record| record.seq).collect();
        let Some(seq) = random.pick(&lost) else { return false };
        change_at(entries, seq, |record| {
            record.epoch = Some(1 << 30);
        });
        true
    }),
    ("a run goes on behind its end", Class::EndedTwice, |entries, random| {
        let (_, records) = complete(entries);
        let ends: Vec<&Record> = records.iter().filter(|record| record.kind == "run.end").collect();
        let Some(end) = random.pick(&ends) else { return false };
        let later: Vec<&Record> =
            records.iter().filter(|record| record.seq > end.seq && record.kind == "data").collect();
        let Some(seq) = random.pick(&later).map(|record| record.seq) else { return false };
        change_at(entries, seq, |record| {
            (record.kind, record.data) = ("run.end".into(), None);
            record.run.clone_from(&end.run);
        });
        true
    }),
    ("a process does what it has no right to", Class::Unauthorized, |entries, random| {
        let Some((index, ..)) = random.pick(&acknowledged(entries)) else { return false };
        let process = entries[index].process.clone();
        let event = granted("ss", "append");
        entries.insert(0, Entry { at: 0, process, event });
        true
    }),
    ("a reader reads long after it may", Class::RevokedDelivery, |entries, random| {
        let delivered = deliveries(entries, |_| true, 1);
        let Some(index) = random.pick(&delivered).filter(|index| entries[*index].at > 20 * TICK) else { return false };
        let process = entries[index].process.clone();
        let event = granted("s", "read");
        entries.insert(0, Entry { at: 0, process: process.clone(), event });
        entries.insert(1, Entry { at: 1, process, event: Event::Revoked {} });
        true
    }),
    ("a process is refused what it has a right to", Class::WronglyRefused, |entries, _| {
        let process = "refused".to_owned();
        entries.insert(0, Entry { at: 0, process: process.clone(), event: granted("", "manage") });
        let call = Call::Trim { session: "s".into(), before: 0 };
        entries.push(Entry { at: 2, process: process.clone(), event: Event::Invoke { op: 1 << 40, call } });
        let event = Event::Fail { op: 1 << 40, code: "FORBIDDEN".into() };
        entries.push(Entry { at: 3, process, event });
        true
    }),
    ("an operation is asked for twice", Class::Malformed, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Invoke { .. })) else { return false };
        let again = entries[index].event.clone();
        behind(entries, index, again);
        true
    }),
    ("the disk lacks its beginning", Class::Hole, |entries, _| {
        let (tail, mut records) = complete(entries);
        records.remove(0);
        dumped(entries, (1, tail), false, records);
        true
    }),
    ("a hole, and a disk on which something was put together", Class::Hole, |entries, _| {
        let (tail, records) = complete(entries);
        for entry in entries.iter_mut() {
            if let Event::Final { tail, .. } = &mut entry.event {
                *tail += 3;
            }
        }
        dumped(entries, (0, tail), true, records);
        true
    }),
    ("a message lacks a part", Class::LostWrite, |entries, random| {
        let spoken = answered(entries, |call| matches!(call, Call::Speak { .. }));
        let Some((_, end)) = random.pick(&spoken) else { return false };
        everywhere(entries, |record| {
            if record.seq + 1 == end {
                record.data = None;
            }
        });
        true
    }),
    ("a message says what nobody wrote", Class::Phantom, |entries, random| {
        let Some(seq) = seq_of(entries, random, "message.append") else { return false };
        change_at(entries, seq, |record| {
            record.data = Some("nobody's".into());
        });
        true
    }),
    ("a message that nobody wrote", Class::Phantom, |entries, random| {
        let Some(index) =
            pick(entries, random, |event| matches!(event, Event::Invoke { call: Call::Speak { .. }, .. }))
        else {
            return false;
        };
        let Event::Invoke { op, call: Call::Speak { message, .. } } = entries[index].event.clone() else {
            return false;
        };
        if complete(entries).1.iter().all(|record| record.message.as_ref() != Some(&message)) {
            return false;
        }
        entries.retain(|entry| !matches!(&entry.event, Event::Invoke { op: of, .. } | Event::Ok { op: of, .. } | Event::Unknown { op: of } if *of == op));
        true
    }),
    ("a reader was given another text of a message", Class::InconsistentSeq, |entries, random| {
        let parts = |event: &Event| matches!(event, Event::Records { records, .. } if records.iter().any(|record| record.kind == "message.append"));
        let Some(index) = pick(entries, random, parts) else { return false };
        let Event::Records { records, .. } = &mut entries[index].event else { return false };
        let part = records.iter_mut().find(|record| record.kind == "message.append").expect("a part");
        part.data = Some("other".into());
        true
    }),
    ("a part of a message that was delivered is gone", Class::Vanished, |entries, random| {
        let delivered = entries.iter().filter_map(|entry| match &entry.event {
            Event::Records { records, .. } => Some(records.iter().filter(|record| record.kind == "message.append")),
            _ => None,
        });
        let delivered: Vec<u64> = delivered.flatten().map(|record| record.seq).collect();
        let Some(seq) = random.pick(&delivered) else { return false };
        for entry in entries {
            if let Event::Final { records, .. } = &mut entry.event {
                records.retain(|record| record.seq != seq);
            }
        }
        true
    }),
    ("a run was begun, and is nowhere", Class::LostWrite, |entries, random| {
        let begun = answered(entries, |call| matches!(call, Call::StartRun { .. }));
        let Some((_, seq)) = random.pick(&begun) else { return false };
        change_at(entries, seq, |record| {
            record.kind = "run.consumed".into();
        });
        true
    }),
    ("somebody is a member who did not ask", Class::Phantom, |entries, random| {
        let Some(seq) = seq_of(entries, random, "presence.joined") else { return false };
        change_at(entries, seq, |record| {
            record.author = "nobody".into();
        });
        true
    }),
    ("a change of a key is not in the tail that is told later", Class::StaleRead, |entries, random| {
        let changes = answered(entries, |call| matches!(call, Call::Put { .. }));
        let Some((_, seq)) = random.pick(&changes) else { return false };
        let at = entries.last().expect("entries").at;
        let (session, incarnation, hash) = ("s".to_owned(), "i".to_owned(), format!("h{seq}"));
        let event = Event::Attached { session, incarnation, tail: seq, asked: at, hash, positions: Vec::new() };
        entries.push(Entry { at: at + 1, process: "late".into(), event });
        true
    }),
    ("a process is told less than it knew", Class::NonmonotonicRead, |entries, random| {
        let knows = |event: &Event| matches!(event, Event::Attached { tail, .. } if *tail > 0);
        let Some(index) = pick(entries, random, knows) else { return false };
        let mut less = entries[index].event.clone();
        if let Event::Attached { tail, asked, hash, positions, .. } = &mut less {
            (*tail, *asked) = (*tail - 1, entries[index].at + 1);
            positions.clear();
            *hash = format!("h{tail}");
        }
        behind(entries, index, less);
        true
    }),
    ("what is stored adds up to something else", Class::HashDivergence, |entries, _| {
        let (tail, records) = complete(entries);
        dumped(entries, (0, tail), false, records);
        let Some(Event::Final { hash, .. }) = entries.last_mut().map(|entry| &mut entry.event) else { return false };
        *hash = Some("other".into());
        true
    }),
    ("a member is there for longer than its lease", Class::Ghost, |entries, random| {
        let joined = answered(entries, |call| matches!(call, Call::Join { .. }));
        let told = |generation: u64| {
            entries.iter().find(|entry| {
                matches!(&entry.event, Event::Records { records, .. } if records.iter().any(|record| record.kind == "presence.left" && record.generation == Some(generation)))
            })
        };
        let left: Vec<_> = joined.into_iter().filter_map(|(op, seq)| Some((op, told(seq)?.at))).collect();
        let Some((op, told)) = random.pick(&left) else { return false };
        let index = invoked(entries, op);
        let Event::Invoke { call: Call::Join { lease, .. }, .. } = &mut entries[index].event else { return false };
        *lease = Some(1);
        behind(entries, index, Event::Gone {});
        let gone = entries[index].at;
        // Whoever is told was there all the time.
        let first = entries.iter().find(|entry| entry.at == told).and_then(|entry| of_subscription(&entry.event));
        let theirs: Vec<_> = entries.iter().filter(|entry| of_subscription(&entry.event) == first).collect();
        let connects = |event: &Event| matches!(event, Event::Started { .. } | Event::Resumed { .. });
        let comes = theirs.iter().any(|entry| (gone..told).contains(&entry.at) && connects(&entry.event));
        theirs.iter().any(|entry| entry.at < gone) && !comes && gone + 1 < told
    }),
    ("a process is given what another namespace wrote", Class::CrossedNamespaces, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |_| true, 1)) else { return false };
        let Event::Records { records, .. } = &entries[index].event else { return false };
        if records.iter().all(|record| record.kind != "data") {
            return false;
        }
        let process = entries[index].process.clone();
        let (prefix, operations, subject) = (String::new(), vec!["read".to_owned()], String::new());
        let event = Event::Granted { prefix, operations, namespace: "other".into(), subject };
        entries.insert(0, Entry { at: 0, process, event });
        true
    }),
    ("a producer is told to go on behind what is not stored", Class::WrongPosition, |entries, random| {
        let event = |event: &Event| matches!(event, Event::Attached { positions, .. } if !positions.is_empty());
        let Some(index) = pick(entries, random, event) else { return false };
        let Event::Attached { positions, .. } = &mut entries[index].event else { return false };
        positions[0].next += 1000;
        true
    }),
    ("a producer is told to go on before what is stored", Class::WrongPosition, |entries, random| {
        let event = |event: &Event| matches!(event, Event::Attached { positions, .. } if positions.iter().any(|position| position.next > 0));
        let Some(index) = pick(entries, random, event) else { return false };
        let Event::Attached { positions, .. } = &mut entries[index].event else { return false };
        // Of what nobody was answered it is not known in a history that ends before.
        let position = positions.iter_mut().find(|position| position.next > 0);
        position.is_some_and(|position| {
            position.next -= 1;
            true
        })
    }),
    ("a producer is told an epoch that is over", Class::WrongPosition, |entries, random| {
        let event = |event: &Event| matches!(event, Event::Attached { positions, .. } if !positions.is_empty());
        let Some(index) = pick(entries, random, event) else { return false };
        let asked = match &entries[index].event {
            Event::Attached { asked, .. } => *asked,
            _ => return false,
        };
        let granted = openings(entries);
        let Event::Attached { positions, .. } = &mut entries[index].event else { return false };
        let position = positions.iter_mut().find(|position| {
            granted
                .iter()
                .any(|(at, producer, epoch)| *at < asked && *producer == position.producer && *epoch == position.epoch)
        });
        position.is_some_and(|position| {
            position.epoch -= 1;
            true
        })
    }),
    ("a producer is told an epoch that nobody was granted", Class::WrongPosition, |entries, random| {
        let event = |event: &Event| matches!(event, Event::Attached { positions, .. } if !positions.is_empty());
        let Some(index) = pick(entries, random, event) else { return false };
        let Event::Attached { positions, .. } = &mut entries[index].event else { return false };
        positions[0].epoch += 1000;
        true
    }),
    ("a change that nobody was told of is stored against its condition", Class::WrongChange, |entries, random| {
        let conditional = |call: &Call| matches!(call, Call::Put { expected: Some(_), .. });
        let Some((op, _)) = random.pick(&answered(entries, conditional)) else { return false };
        let index = invoked(entries, op);
        let Event::Invoke { call: Call::Put { expected: Some(expected), .. }, .. } = &mut entries[index].event else {
            return false;
        };
        *expected += 1;
        forget_the_answer(entries, op);
        true
    }),
    ("an increment that nobody was told of adds something else", Class::WrongChange, |entries, random| {
        let increments = answered(entries, |call| matches!(call, Call::Increment { .. }));
        let Some((_, seq)) = random.pick(&increments) else { return false };
        change_at(entries, seq, |record| {
            record.value = Some("100000".into());
        });
        // Those behind it add to what it left.
        increments.iter().for_each(|(op, _)| forget_the_answer(entries, *op));
        true
    }),
    ("an append of a run is stored without it", Class::LostWrite, |entries, random| {
        let (_, records) = complete(entries);
        let of_runs: Vec<u64> = records
            .iter()
            .filter(|record| record.kind == "data" && record.run.is_some())
            .map(|record| record.seq)
            .collect();
        let Some(seq) = random.pick(&of_runs) else { return false };
        change_at(entries, seq, |record| {
            record.run = None;
        });
        true
    }),
    ("a record stands under the name of somebody else", Class::Phantom, |entries, random| {
        let (_, records) = complete(entries);
        let data: Vec<&Record> = records.iter().filter(|record| record.kind == "data").collect();
        let Some(of) = random.pick(&data).map(|record| (record.seq, record.author.clone())) else { return false };
        change_at(entries, of.0, |record| {
            record.author = "somebody else".into();
        });
        // Of the only one nobody knows how it should be.
        data.iter().filter(|record| record.author == of.1).count() > 1
    }),
    ("a gap is told before anybody asked for a trim", Class::SkippedDelivery, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |of| !is_filtered(entries, of), 1)) else { return false };
        let Event::Records { subscription, from, next, .. } = entries[index].event else { return false };
        entries[index].event = Event::Gap { subscription, from, to: next };
        let (at, call) = (entries.last().expect("entries").at, Call::Trim { session: "s".into(), before: next });
        entries.push(Entry { at, process: "late".into(), event: Event::Invoke { op: 1 << 40, call } });
        true
    }),
    ("what was to last for ever expires", Class::WrongChange, |entries, random| {
        let Some(seq) = seq_of(entries, random, "state.expired") else { return false };
        let (_, records) = complete(entries);
        let expired = records.iter().find(|record| record.seq == seq).expect("a record");
        let mut puts =
            records.iter().filter(|record| record.seq < seq && record.kind == "state.put" && record.key == expired.key);
        let Some(value) = puts.next_back().and_then(|record| record.value.clone()) else { return false };
        entries.iter_mut().any(|entry| match &mut entry.event {
            Event::Invoke { call: Call::Put { value: of, lasts, .. }, .. } if *of == value => {
                *lasts = None;
                true
            }
            _ => false,
        })
    }),
    ("a key expires that has no value", Class::WrongChange, |entries, random| {
        let Some(seq) = seq_of(entries, random, "state.deleted") else { return false };
        let (_, records) = complete(entries);
        let key = |of: u64| records.iter().find(|record| record.seq == of).and_then(|record| record.key.clone());
        let next = records.iter().find(|record| record.seq > seq && record.key == key(seq));
        let Some(next) = next.filter(|next| next.kind == "state.deleted").map(|next| next.seq) else { return false };
        change_at(entries, next, |record| {
            record.kind = "state.expired".into();
        });
        true
    }),
    ("a reader is jumped by a view that he did not ask for", Class::SkippedDelivery, |entries, random| {
        let Some(index) = random.pick(&deliveries(entries, |_| true, 0)) else { return false };
        let Event::Records { subscription, next, .. } = entries[index].event else { return false };
        entries[index].event = Event::Skipped { subscription, next, hash: Some(format!("h{next}")) };
        true
    }),
    ("a view that was asked for does not come", Class::SkippedDelivery, |entries, _| {
        let Some(index) = indices(entries, |event| matches!(event, Event::Skipped { .. })).pop() else { return false };
        let subscription = of_subscription(&entries[index].event);
        entries.remove(index);
        let mut later = entries[index..].iter().filter(|entry| of_subscription(&entry.event) == subscription);
        later.any(|entry| matches!(entry.event, Event::Records { .. }))
    }),
    ("a view that a reader begins with is another", Class::HashDivergence, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Skipped { .. })) else { return false };
        let Event::Skipped { next: at, hash, .. } = &mut entries[index].event else { return false };
        *hash = Some("other".into());
        let at = *at;
        entries.iter().any(|entry| matches!(entry.event, Event::Attached { tail, .. } if tail == at))
    }),
    ("a record stands in another stream", Class::LostWrite, |entries, random| {
        let Some(seq) = seq_of(entries, random, "data") else { return false };
        change_at(entries, seq, |record| {
            record.stream = "elsewhere".into();
        });
        true
    }),
    ("a run is lost that nobody let go of", Class::TwoHolders, |entries, _| {
        is_calm(entries) && unask(entries, |call| matches!(call, Call::ReleaseRun { .. })) && loses(entries)
    }),
    ("a member has left that did not ask for it", Class::MissingMember, |entries, _| {
        is_calm(entries) && unask(entries, |call| matches!(call, Call::Leave { .. }))
    }),
    ("nobody is told what became of an append", Class::Unanswered, |entries, random| {
        let Some((_, op, ..)) = random.pick(&acknowledged(entries)) else { return false };
        forget_the_answer(entries, op);
        is_calm(entries)
    }),
    ("an append is never answered", Class::Unanswered, |entries, random| {
        let Some((index, ..)) = random.pick(&acknowledged(entries)) else { return false };
        entries.remove(index);
        is_calm(entries)
    }),
    ("a run is lost that nobody let go of behind a fault that is over", Class::TwoHolders, |entries, _| {
        let holds = |call: &Call| matches!(call, Call::StartRun { .. } | Call::TakeRun { .. });
        is_calm(entries)
            && have_been_answered_before(entries, holds)
            && unask(entries, |call| matches!(call, Call::ReleaseRun { .. }))
            && loses(entries)
            && is_over_before_all(entries)
    }),
    ("a member has left that did not ask for it behind a fault that is over", Class::MissingMember, |entries, _| {
        is_calm(entries)
            && have_been_answered_before(entries, |call| matches!(call, Call::Join { .. }))
            && unask(entries, |call| matches!(call, Call::Leave { .. }))
            && is_over_before_all(entries)
    }),
    ("an append is never answered behind a fault that is over", Class::Unanswered, |entries, random| {
        let Some((before, op)) = two_appends_of_one(entries, random) else { return false };
        disturb_before(entries, before, true);
        forget_the_answer(entries, op);
        !may_be_fenced(entries, op)
    }),
    ("a subscription begins before the place that was asked for", Class::WrongResume, |entries, random| {
        let begins = |event: &Event| matches!(event, Event::Started { from: Some(Begin::Latest | Begin::Last(_) | Begin::View), next, .. } if *next > 0);
        let Some(index) = pick(entries, random, begins) else { return false };
        let Event::Started { next, .. } = &mut entries[index].event else { return false };
        *next -= 1;
        true
    }),
    ("an earliest subscription begins later", Class::WrongResume, |entries, random| {
        let begins = |event: &Event| matches!(event, Event::Started { from: Some(Begin::Earliest), .. });
        let Some(index) = pick(entries, random, begins) else { return false };
        let Event::Started { next, .. } = &mut entries[index].event else { return false };
        *next += 1;
        true
    }),
    ("a session has another life, and nobody deleted it", Class::MixedTimelines, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Started { .. })) else { return false };
        let Event::Started { incarnation, .. } = &mut entries[index].event else { return false };
        *incarnation = "another".into();
        true
    }),
    ("a fenced producer writes, and nobody is told", Class::UnfencedWrite, |entries, random| {
        let opened = openings(entries);
        let late: Vec<_> = acknowledged(entries)
            .into_iter()
            .filter(|(_, op, _, call)| {
                let asked = entries[invoked(entries, *op)].at;
                let Call::Append { producer, epoch, .. } = call else { return false };
                *epoch > 1
                    && opened.iter().any(|(at, name, granted)| *at < asked && name == producer && granted >= epoch)
            })
            .collect();
        let Some((_, op, ..)) = random.pick(&late) else { return false };
        let index = invoked(entries, op);
        let Event::Invoke { call: Call::Append { epoch, .. }, .. } = &mut entries[index].event else { return false };
        *epoch -= 1;
        forget_the_answer(entries, op);
        true
    }),
    ("what nobody was told of is stored without a right", Class::Unauthorized, |entries, random| {
        let Some((index, op, ..)) = random.pick(&acknowledged(entries)) else { return false };
        let process = entries[index].process.clone();
        forget_the_answer(entries, op);
        entries.insert(0, Entry { at: 0, process, event: granted("", "read") });
        true
    }),
    ("a process has a view that it may not read", Class::Unauthorized, |entries, _| {
        entries.insert(0, Entry { at: 0, process: "looker".into(), event: granted("", "append") });
        entries.iter().any(|entry| matches!(entry.event, Event::View { .. }))
    }),
    ("a message is said to end elsewhere", Class::LostWrite, |entries, random| {
        let Some((op, _)) = random.pick(&answered(entries, |call| matches!(call, Call::Speak { .. }))) else {
            return false;
        };
        let is = |event: &Event| matches!(event, Event::Ok { op: of, .. } if *of == op);
        let index = indices(entries, is)[0];
        let Event::Ok { seq: Some(seq), .. } = &mut entries[index].event else { return false };
        *seq -= 1;
        true
    }),
    ("a message that failed is stored", Class::AbortedRead, |entries, random| {
        let Some((op, _)) = random.pick(&answered(entries, |call| matches!(call, Call::Speak { .. }))) else {
            return false;
        };
        let is = |event: &Event| matches!(event, Event::Ok { op: of, .. } if *of == op);
        let index = indices(entries, is)[0];
        entries[index].event = Event::Fail { op, code: "OVERLOADED".into() };
        true
    }),
    ("a message ends otherwise", Class::LostWrite, |entries, random| {
        let Some(seq) = seq_of(entries, random, "message.end") else { return false };
        change_at(entries, seq, |record| {
            record.status = Some("error".into());
        });
        true
    }),
    ("a message begins twice", Class::Duplicate, |entries, random| {
        let Some(seq) = seq_of(entries, random, "message.end") else { return false };
        change_at(entries, seq, |record| {
            record.kind = "message.start".into();
        });
        true
    }),
    ("a member joins once more while it is there", Class::Duplicate, |entries, random| {
        let Some(seq) = seq_of(entries, random, "presence.left") else { return false };
        let (_, records) = complete(entries);
        let member = records.into_iter().find(|record| record.seq == seq).and_then(|record| record.member);
        // Of whom it is not known that he left it is not known either that he may not join again.
        let leaves = |event: &Event| matches!(event, Event::Invoke { call: Call::Leave { author, .. }, .. } if Some(author) == member.as_ref());
        let told =
            answered(entries, |call| matches!(call, Call::Leave { author, .. } if Some(author) == member.as_ref()));
        if told.len() < indices(entries, leaves).len() {
            return false;
        }
        change_at(entries, seq, |record| {
            record.kind = "presence.joined".into();
        });
        true
    }),
    ("somebody is told of what never is there", Class::Vanished, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Attached { .. })) else { return false };
        let Event::Attached { tail, .. } = &mut entries[index].event else { return false };
        *tail += 1000;
        true
    }),
    ("a complete read ends before its records", Class::Malformed, |entries, _| {
        for entry in entries {
            if let Event::Final { tail, .. } = &mut entry.event {
                *tail = 0;
            }
        }
        true
    }),
    ("a view lacks a message", Class::MessageDivergence, |entries, random| {
        let has = |event: &Event| matches!(event, Event::View { view, .. } if !view.messages.is_empty());
        let Some(index) = pick(entries, random, has) else { return false };
        let Event::View { view, .. } = &mut entries[index].event else { return false };
        view.messages.pop_first();
        true
    }),
    ("a value expires too early", Class::WrongChange, |entries, random| {
        let Some(seq) = seq_of(entries, random, "state.expired") else { return false };
        let seen = |entry: &&Entry| matches!(&entry.event, Event::Records { records, .. } if records.iter().any(|record| record.seq == seq));
        // One that only the complete read at the end has is there at the end of time.
        if !entries.iter().any(|entry| seen(&entry)) {
            return false;
        }
        for entry in &mut *entries {
            if let Event::Invoke { call: Call::Put { lasts: Some(lasts), .. }, .. } = &mut entry.event {
                *lasts = 1 << 40;
            }
        }
        is_calm(entries)
    }),
    ("a run is held by somebody who is long gone", Class::TwoHolders, |entries, _| {
        let (_, records) = complete(entries);
        let over: Vec<_> =
            records.iter().filter(|record| record.kind == "run.end" || record.kind == "run.lost").collect();
        let started = records.iter().filter(|record| record.kind == "run.start" && record.lost_epoch.is_none());
        let mut held = started.filter(|record| over.iter().all(|over| over.run != record.run));
        let Some(run) = held.next().and_then(|record| record.run.clone()) else { return false };
        let starts =
            |event: &Event| matches!(event, Event::Invoke { call: Call::StartRun { run: of, .. }, .. } if *of == run);
        let Some(index) = indices(entries, starts).pop() else { return false };
        let Event::Invoke { op, call: Call::StartRun { lease, .. } } = &mut entries[index].event else { return false };
        *lease = Some(1);
        let op = *op;
        let told = indices(entries, |event| matches!(event, Event::Ok { op: of, .. } if *of == op)).pop();
        told.is_some_and(|told| {
            behind(entries, told, Event::Gone {});
            true
        })
    }),
    ("nothing was read at the end", Class::NothingProvoked, |entries, _| {
        entries.retain(|entry| !matches!(entry.event, Event::Final { .. }));
        true
    }),
];

/// The same of sessions beside: see `legal::sides`.
const BESIDE: &[(&str, Class, Mutation)] = &[
    ("signals are stored about the run of another one", Class::Unauthorized, |entries, random| {
        of_an_owned_run(entries, random, "run.start", |record| {
            record.author = "stranger/9".into();
        })
    }),
    ("a signal is stored that was refused", Class::Phantom, |entries, random| {
        of_an_owned_run(entries, random, "signal.approve", |record| {
            (record.kind, record.author) = ("signal.steer".into(), "nobody/4".into());
        })
    }),
    ("a signal is stored twice", Class::Duplicate, |entries, random| {
        of_an_owned_run(entries, random, "signal.approve", |record| {
            (record.kind, record.author) = ("signal.steer".into(), "boss/3".into());
        })
    }),
    ("a signal is refused to him who may send any", Class::WronglyRefused, |entries, random| {
        refuse_a_signal(entries, random, |process, _| process == "customer-3")
    }),
    ("a signal about his own run is refused to its only holder", Class::WronglyRefused, |entries, random| {
        let taken = |event: &Event| match event {
            Event::Invoke { call: Call::TakeRun { run, .. }, .. } => Some(run.clone()),
            _ => None,
        };
        let taken: Vec<String> = entries.iter().filter_map(|entry| taken(&entry.event)).collect();
        refuse_a_signal(entries, random, |process, run| {
            !taken.iter().any(|taken| taken == run) && process.replace("customer", "owned") == run
        })
    }),
    ("a signal is stored that nobody sent", Class::Phantom, |entries, random| {
        let run = format!("owned-{}", random.below(3));
        let about = |event: &Event| match event {
            Event::Invoke { op, call: Call::Signal { run: of, .. } } if *of == run => Some(*op),
            _ => None,
        };
        let ops: Vec<u64> = entries.iter().filter_map(|entry| about(&entry.event)).collect();
        entries.retain(|entry| match &entry.event {
            Event::Invoke { op, .. } | Event::Ok { op, .. } | Event::Fail { op, .. } => !ops.contains(op),
            _ => true,
        });
        !ops.is_empty()
    }),
    ("a signal is told to be stored where nothing is", Class::LostWrite, |entries, random| {
        let Some((op, _)) = random.pick(&answered(entries, |call| matches!(call, Call::Signal { .. }))) else {
            return false;
        };
        let is = |event: &Event| matches!(event, Event::Ok { op: of, .. } if *of == op);
        let index = indices(entries, is)[0];
        entries[index].event = Event::Ok { op, seq: Some(1 << 40) };
        true
    }),
    ("a gap is longer than what was given up", Class::SkippedDelivery, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Gap { .. })) else { return false };
        let Event::Gap { to, .. } = &mut entries[index].event else { return false };
        *to += 1;
        true
    }),
    ("what was given up is passed over in silence", Class::SkippedDelivery, |entries, random| {
        let Some(index) = pick(entries, random, |event| matches!(event, Event::Gap { .. })) else { return false };
        entries.remove(index);
        matches!(entries[index].event, Event::Records { .. })
    }),
    ("more is gone than was given up", Class::Hole, |entries, _| {
        entries.iter_mut().any(|entry| match &mut entry.event {
            Event::Final { session, first, records, .. } if session == "trimmed" && !records.is_empty() => {
                records.remove(0);
                *first += 1;
                true
            }
            _ => false,
        })
    }),
    ("of what was given up a key had another value", Class::WrongChange, |entries, random| {
        let first = entries.iter().find_map(|entry| match &entry.event {
            Event::Final { session, first, .. } if session == "trimmed" => Some(*first),
            _ => None,
        });
        let mut puts = Vec::new();
        for entry in &mut *entries {
            let Event::Records { records, .. } = &entry.event else { continue };
            let of = records.iter().filter(|record| record.value.as_ref().is_some_and(|it| it.starts_with("trimmed-")));
            puts.extend(of.filter(|record| Some(record.seq) < first).map(|record| record.seq));
        }
        let Some(seq) = random.pick(&puts) else { return false };
        everywhere(entries, |record| {
            if record.seq == seq && record.author == "putter" {
                record.value = Some("another".into());
            }
        });
        true
    }),
    ("who asks for a life that is over goes on in it", Class::MixedTimelines, |entries, random| {
        let gone = |event: &Event| matches!(event, Event::Fail { code, .. } if code == "GONE");
        let Some(index) = pick(entries, random, gone) else { return false };
        let Event::Fail { op, .. } = entries[index].event else { return false };
        entries[index].event = Event::Ok { op, seq: Some(0) };
        true
    }),
    ("a message that was put together lacks a part", Class::LostWrite, |entries, _| {
        everywhere(entries, |record| {
            if record.kind == "message.replace" {
                record.data = record.data.as_ref().map(|text| text.chars().skip(3).collect());
            }
        });
        true
    }),
    ("a member outstays its lease", Class::Ghost, |entries, _| {
        let dead: Vec<String> = entries
            .iter()
            .filter(|entry| matches!(entry.event, Event::Gone {}))
            .map(|entry| entry.process.clone())
            .collect();
        for entry in &mut *entries {
            if let Event::Invoke { call: Call::Join { author, lease, .. }, .. } = &mut entry.event
                && dead.contains(author)
            {
                *lease = Some(1);
            }
        }
        !dead.is_empty()
    }),
    ("a member that died never leaves", Class::Ghost, |entries, _| {
        let dead = |event: &Event| matches!(event, Event::Gone {});
        let Some(author) = indices(entries, dead).first().map(|index| entries[*index].process.clone()) else {
            return false;
        };
        let left = |record: &Record| record.kind == "presence.left" && record.member.as_ref() == Some(&author);
        for entry in entries {
            if let Event::Records { records, .. } | Event::Final { records, .. } = &mut entry.event {
                records.retain(|record| !left(record));
            }
        }
        true
    }),
];

/// Nothing was in the way of anybody.
fn is_calm(entries: &[Entry]) -> bool {
    !entries.iter().any(|entry| matches!(entry.event, Event::Provoked { .. }))
}

/// Two appends to one session that one process asked for and that were answered, one before the other was asked for, where nothing was in the
/// way of anybody.
fn two_appends_of_one(entries: &[Entry], random: &mut Random) -> Option<(u64, u64)> {
    let asked =
        |op: u64| entries.iter().position(|entry| matches!(entry.event, Event::Invoke { op: of, .. } if of == op));
    let all = acknowledged(entries);
    let mut pairs = Vec::new();
    for (answer, first, ..) in &all {
        for (_, second, ..) in &all {
            let (Some(from), Some(then)) = (asked(*first), asked(*second)) else { continue };
            if entries[*answer].at < entries[then].at && entries[from].process == entries[then].process {
                pairs.push((*first, *second));
            }
        }
    }
    if is_calm(entries) { random.pick(&pairs) } else { None }
}

/// Somebody may have opened the producer of an append anew before that was answered.
fn may_be_fenced(entries: &[Entry], op: u64) -> bool {
    let asked = entries.iter().find_map(|entry| match &entry.event {
        Event::Invoke { op: of, call: Call::Append { producer, epoch, .. } } if *of == op => Some((producer, *epoch)),
        _ => None,
    });
    let told = entries.iter().find(|entry| matches!(entry.event, Event::Unknown { op: of } if of == op));
    let (Some((name, epoch)), Some(told)) = (asked, told) else { return true };
    let granted = |of: u64| {
        entries.iter().find_map(|entry| match entry.event {
            Event::Ok { op, seq } if op == of => seq,
            _ => None,
        })
    };
    entries.iter().any(|entry| match &entry.event {
        Event::Invoke { op, call: Call::OpenProducer { producer, .. } } if producer == name && entry.at < told.at => {
            granted(*op).is_none_or(|granted| granted > epoch)
        }
        _ => false,
    })
}

/// Whoever had such a thing done had had something done before that.
fn have_been_answered_before(entries: &[Entry], sort: impl Fn(&Call) -> bool) -> bool {
    let of_sort = done(entries, sort);
    let all = done(entries, |call| !matches!(call, Call::ReleaseRun { .. } | Call::Leave { .. }));
    let mut asked: BTreeMap<u64, &str> = BTreeMap::new();
    let mut answered: Vec<&str> = Vec::new();
    entries.iter().all(|entry| match entry.event {
        Event::Invoke { op, .. } => {
            asked.insert(op, &entry.process);
            !of_sort.contains(&op) || answered.contains(&entry.process.as_str())
        }
        Event::Ok { op, .. } => {
            answered.extend(asked.get(&op).filter(|_| all.contains(&op)));
            true
        }
        _ => true,
    })
}

/// Something was done to the system before everything else, and is over.
fn is_over_before_all(entries: &mut Vec<Entry>) -> bool {
    let at = entries[0].at;
    let events = [Event::Provoked { what: "kill".into(), count: 1 }, Event::Healed {}];
    entries.splice(0..0, events.map(|event| Entry { at, process: "world".into(), event }));
    true
}

/// Something is done to the system just before an operation is asked for, and may be over by then.
fn disturb_before(entries: &mut Vec<Entry>, op: u64, is_over: bool) {
    let asks = |entry: &Entry| matches!(entry.event, Event::Invoke { op: of, .. } if of == op);
    let at = entries.iter().find(|entry| asks(entry)).expect("the operation").at - 1;
    let place = entries.partition_point(|entry| entry.at <= at);
    let events = [Event::Provoked { what: "kill".into(), count: 1 }, Event::Healed {}];
    let process = "world".to_owned();
    for event in events.into_iter().take(1 + usize::from(is_over)).rev() {
        entries.insert(place, Entry { at, process: process.clone(), event });
    }
}

/// Nobody asked for anything of this sort, whatever came of it. False if nobody did before either.
fn unask(entries: &mut Vec<Entry>, sort: impl Fn(&Call) -> bool) -> bool {
    let ops = done(entries, sort);
    entries.retain(|entry| match entry.event {
        Event::Invoke { op, .. } | Event::Ok { op, .. } | Event::Fail { op, .. } => !ops.contains(&op),
        _ => true,
    });
    !ops.is_empty()
}

/// Operations of this sort that were done.
fn done(entries: &[Entry], sort: impl Fn(&Call) -> bool) -> Vec<u64> {
    let asked = entries.iter().filter_map(|entry| match &entry.event {
        Event::Invoke { op, call } if sort(call) => Some(*op),
        _ => None,
    });
    asked
        .filter(|op| entries.iter().any(|entry| matches!(entry.event, Event::Ok { op: of, .. } if of == *op)))
        .collect()
}

/// A run is lost in it.
fn loses(entries: &[Entry]) -> bool {
    complete(entries).1.iter().any(|record| record.kind == "run.lost")
}

/// When which producer was opened anew, as answered, and under which epoch.
fn openings(entries: &[Entry]) -> Vec<(u64, String, u64)> {
    let mut found = Vec::new();
    for entry in entries {
        let Event::Invoke { op, call: Call::OpenProducer { producer, .. } } = &entry.event else { continue };
        for answer in entries {
            if let Event::Ok { op: of, seq: Some(epoch) } = answer.event
                && of == *op
            {
                found.push((answer.at, producer.clone(), epoch));
            }
        }
    }
    found
}

fn seed() -> u64 {
    let given = std::env::var("MAINSTAY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) << 20 ^ 0x5eed);
    println!("repeat with MAINSTAY_SEED={seed} cargo nextest run -p mainstay-checker");
    seed
}

/// What is in some of them.
const ALL_SORTS: [&str; 12] = [
    "fenced",
    "conflicts",
    "takeovers",
    "members",
    "gaps",
    "lives-over",
    "leases-ended",
    "resumes-gap",
    "trimmed-and-whole",
    "times",
    "own-signals",
    "others-signals-forbidden",
];

#[test]
fn what_a_faultless_service_does_is_sound() {
    let mut random = Random(seed());
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for round in 0..300 {
        let mut entries = history(&mut random);
        entries.extend(sides::all(&mut random));
        let verdict = check(entries, &[]);
        assert!(verdict.is_sound(), "round {round}: {:#?}", verdict.violations);
        for (what, count) in verdict.counts {
            *counts.entry(what).or_default() += count;
        }
    }
    for what in ALL_SORTS {
        assert!(counts.get(what).is_some_and(|count| *count > 0), "{what} is in no history");
    }
}

#[test]
fn each_change_of_a_sound_history_is_found_for_what_it_is() {
    let mut random = Random(seed());
    let all = MUTATIONS.iter().map(|mutation| (mutation, false)).chain(BESIDE.iter().map(|mutation| (mutation, true)));
    for ((what, class, mutation), beside) in all {
        let mut done = 0;
        for _ in 0..400 {
            let mut entries = if beside { sides::all(&mut random) } else { history(&mut random) };
            if !mutation(&mut entries, &mut random) {
                continue;
            }
            done += 1;
            let verdict = check(entries, &[]);
            assert!(
                verdict.broken.contains_key(class),
                "{what}: not found as {class:?}, but as {:#?}",
                verdict.violations
            );
            if done == 20 {
                break;
            }
        }
        assert!(done >= 5, "{what}: only {done} histories had something to change");
    }
}

/// As the description of the format shows it.
#[test]
fn the_example_of_the_format_is_a_history() {
    let text = include_str!("../src/history.rs");
    let lines = text.lines().filter_map(|line| line.strip_prefix("//! ")).filter(|line| line.starts_with('{'));
    let entries = read(lines.collect::<Vec<_>>().join("\n").as_bytes()).expect("a history");
    assert_eq!(entries.len(), 3);
}

/// Histories that were judged wrongly once, and what each is.
#[test]
fn what_was_judged_wrongly_once_is_judged_rightly() {
    let known: [(&str, Option<Class>); 11] = [
        ("condition-beside-another-deletion", Some(Class::WrongChange)),
        ("deletion-read-before-it-was-asked-for", Some(Class::PrecommittedRead)),
        ("time-of-a-part", Some(Class::TimeRanBackwards)),
        ("append-lost-in-what-was-given-up", Some(Class::LostWrite)),
        ("run-lost-in-what-was-given-up", Some(Class::LostWrite)),
        ("batch-torn-in-what-was-given-up", Some(Class::TornBatch)),
        ("fenced-behind-a-fault", None),
        ("released-while-away", None),
        ("second-life-alone-was-read", None),
        ("trimmed-and-whole", None),
        ("without-times", None),
    ];
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("histories");
    for (name, class) in known {
        let text = std::fs::read_to_string(dir.join(format!("{name}.jsonl"))).expect("a history");
        let mut entries = read(text.as_bytes()).expect("a history");
        if let Ok(dump) = std::fs::read_to_string(dir.join(format!("{name}.dump.jsonl"))) {
            let at = entries.last().expect("entries").at;
            let dumped = completed(&entries, read_dump(dump.as_bytes()).expect("a dump"));
            entries.extend(dumped.into_iter().map(|event| Entry { at, process: "disk".into(), event }));
        }
        let mut broken = check(entries, &[]).broken;
        // They are as short as can be.
        broken.remove(&Class::NothingProvoked);
        assert_eq!(broken.keys().next().copied(), class, "{name}: {broken:?}");
    }
}

/// Nobody has to be answered while something is done to the system, nor before he has found back.
#[test]
fn who_was_not_answered_because_of_a_fault_is_none_of_the_checkers_business() {
    let mut random = Random(seed());
    let mut tried = 0;
    for _ in 0..400 {
        let entries = history(&mut random);
        let Some((before, op)) = two_appends_of_one(&entries, &mut random) else { continue };
        tried += 1;
        // It goes on; it is over, and nobody was answered since; it is over, and then something else happens.
        for (first, is_over, second) in [(before, false, None), (op, true, None), (before, true, Some(op))] {
            let mut entries = entries.clone();
            disturb_before(&mut entries, first, is_over);
            second.into_iter().for_each(|second| disturb_before(&mut entries, second, false));
            forget_the_answer(&mut entries, op);
            let broken = check(entries, &[]).broken;
            assert!(!broken.contains_key(&Class::Unanswered), "{first} {is_over} {second:?}: {broken:?}");
        }
    }
    assert!(tried > 20, "{tried} histories had somebody who was answered twice");
}

#[test]
fn a_session_that_a_dump_does_not_have_is_lost_there() {
    let mut random = Random(seed());
    let acknowledges = |entries: &Vec<Entry>| !acknowledged(entries).is_empty();
    let mut entries = std::iter::repeat_with(|| history(&mut random)).find(acknowledges).expect("a history");
    let at = entries.last().expect("entries").at;
    let nothing = completed(&entries, Vec::new());
    entries.extend(nothing.into_iter().map(|event| Entry { at, process: "disk".into(), event }));
    let verdict = check(entries, &[]);
    assert!(verdict.broken.contains_key(&Class::Vanished), "{:?}", verdict.broken);
}

/// The catalogue of what is promised: each property has a class that breaks it.
#[test]
fn each_property_has_a_class() {
    let known: Vec<&str> = Class::ALL.iter().map(|class| class.property().0).collect();
    let of = |letter: char, count: usize| (1..=count).map(move |n| format!("{letter}{n}"));
    let all = of('L', 9).chain(of('S', 10)).chain(of('W', 2)).chain(of('K', 4));
    for id in all.chain(of('P', 3)).chain(of('R', 3)).chain(of('A', 3)).chain(of('N', 1)) {
        // Of one record at each seq all readers have prefixes, and an order in time is one of keys too.
        let implied = [("S5", "L4"), ("K1", "L5")];
        let id = implied.iter().find(|(of, _)| *of == id).map_or(id.as_str(), |(_, by)| by);
        assert!(known.contains(&id), "{id}");
    }
}

#[test]
fn each_class_has_a_mutation() {
    // A class that is added and has none would be one that nothing shows to be found.
    for class in Class::ALL {
        assert!(MUTATIONS.iter().any(|(_, of, _)| of == class), "{class:?}");
    }
}

#[test]
fn a_history_in_which_nothing_happened_fails() {
    assert!(!check(Vec::new(), &[]).is_sound());
    let mut random = Random(seed());
    // A short one may have nothing that was acknowledged.
    let acknowledges = |entries: &Vec<Entry>| !acknowledged(entries).is_empty();
    let sound = std::iter::repeat_with(|| history(&mut random)).find(acknowledges).expect("a history");
    assert!(check(sound.clone(), &[]).is_sound());
    assert_eq!(check(sound, &["earthquakes".to_owned()]).broken.keys().collect::<Vec<_>>(), [&Class::NothingProvoked]);
}

#[test]
fn a_history_reads_as_it_was_written() {
    let entries = history(&mut Random(1));
    let lines: Vec<String> = entries.iter().map(|entry| serde_json::to_string(entry).expect("JSON")).collect();
    assert_eq!(read(lines.join("\n").as_bytes()).expect("a history"), entries);
    let wrong = read(format!("{}\n{{}}", lines[0]).as_bytes()).expect_err("no entry");
    assert!(wrong.to_string().starts_with("line 2: "), "{wrong}");
}

#[test]
fn a_dump_is_a_complete_read_of_each_session() {
    let dump = r#"{"event":"record","seq":3,"time":"2026-01-01T00:00:00Z","stream":"main","kind":"data","author":"a","data":"x","session":"one"}
{"event":"record","seq":4,"time":"2026-01-01T00:00:00Z","stream":"main","kind":"data","author":"a","data":"y","session":"one"}
{"event":"session","name":"one","first":3,"tail":6,"bytes":9,"compacted":true,"fold_version":5,"view_hash":"00"}
{"event":"session","name":"two","first":0,"tail":0,"bytes":0,"compacted":false,"fold_version":5,"view_hash":"00"}"#;
    let events = read_dump(dump.as_bytes()).expect("a dump");
    let reach: Vec<(&str, u64, u64, usize)> = events
        .iter()
        .map(|event| match event {
            Event::Final { session, first, tail, records, .. } => (session.as_str(), *first, *tail, records.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(reach, [("one", 3, 6, 2), ("two", 0, 0, 0)]);
    // One that ends in the middle is no dump.
    let half = dump.lines().next().expect("a line");
    assert!(read_dump(half.as_bytes()).expect_err("half").to_string().contains("session one"));
}
