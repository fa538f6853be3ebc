//! Histories of a service that does everything right, from a seed.

pub(crate) mod sides;

use std::collections::BTreeMap;

use mainstay_checker::fold::Fold;
use mainstay_checker::history::{Begin, Call, Entry, Event, Filter, Position, Record, View};

/// Nanoseconds between two entries.
pub(crate) const TICK: u64 = 100_000_000;

/// A moment as records show it.
pub(crate) fn time(at: u64) -> String {
    format!("{at:020}")
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    pub(crate) fn pick<T: Clone>(&mut self, among: &[T]) -> Option<T> {
        if among.is_empty() { None } else { Some(among[self.below(among.len() as u64) as usize].clone()) }
    }
}

/// What was asked for and not answered.
struct Pending {
    op: u64,
    process: String,
    call: Call,
    /// What will be answered; `None` before it was decided.
    answer: Option<Result<Option<u64>, &'static str>>,
}

struct Reader {
    number: u64,
    process: String,
    filter: Filter,
    next: u64,
    /// It begins with the view.
    view: bool,
    begun: bool,
}

/// The service, and everybody who uses it.
struct World<'r> {
    random: &'r mut Random,
    at: u64,
    entries: Vec<Entry>,
    log: Vec<Record>,
    fold: Fold,
    pending: Vec<Pending>,
    ops: u64,
    /// The epoch of each producer, and (`held`) that of each writer.
    epochs: BTreeMap<String, u64>,
    /// Batches of each producer.
    batches: BTreeMap<String, u64>,
    held: BTreeMap<(String, String), u64>,
    /// Keys whose value goes by itself, and when it may.
    passing: BTreeMap<String, u64>,
    sequences: BTreeMap<String, u64>,
    readers: Vec<Reader>,
    /// Nothing is in the way of anybody.
    calm: bool,
}

const WRITERS: u64 = 3;
const KEYS: [&str; 3] = ["a", "b", "n"];

/// A history of some dozens of operations, whole and sound.
pub(crate) fn history(random: &mut Random) -> Vec<Entry> {
    let calm = random.below(2) == 0;
    let mut world = World {
        random,
        calm,
        at: 1,
        entries: Vec::new(),
        log: Vec::new(),
        fold: Fold::default(),
        pending: Vec::new(),
        ops: 0,
        epochs: BTreeMap::new(),
        batches: BTreeMap::new(),
        held: BTreeMap::new(),
        passing: BTreeMap::new(),
        sequences: BTreeMap::new(),
        readers: Vec::new(),
    };
    let steps = 150 + world.random.below(250);
    for step in 0..steps {
        world.step(step);
    }
    world.end()
}

impl World<'_> {
    fn say(&mut self, process: &str, event: Event) {
        self.at += TICK / 2 + self.random.below(TICK);
        self.entries.push(Entry { at: self.at, process: process.to_owned(), event });
    }

    fn step(&mut self, step: u64) {
        match self.random.below(12) {
            0..4 => self.ask(),
            4..7 => self.decide(),
            7..9 => self.answer(),
            9 if self.readers.len() < 5 && step.is_multiple_of(7) => self.subscribe(),
            9..11 => self.deliver(),
            11 if step.is_multiple_of(3) => self.expire(),
            _ => self.look(),
        }
    }

    fn invoke(&mut self, process: &str, call: Call) {
        self.ops += 1;
        let op = self.ops;
        self.say(process, Event::Invoke { op, call: call.clone() });
        self.pending.push(Pending { op, process: process.to_owned(), call, answer: None });
    }

    fn ask(&mut self) {
        let writer = format!("writer-{}", self.random.below(WRITERS));
        // One thing at a time, except for what is appended.
        let busy = self
            .pending
            .iter()
            .any(|pending| pending.process == writer && !matches!(pending.call, Call::Append { .. }));
        if busy {
            return;
        }
        let session = "s".to_owned();
        let producer = format!("p{}", self.random.below(2));
        match self.random.below(15) {
            0..6 => {
                let Some(epoch) = self.held.get(&(writer.clone(), producer.clone())).copied() else {
                    return self.invoke(&writer, Call::OpenProducer { session, producer });
                };
                let sequence = self.sequences.entry(writer.clone()).or_default();
                *sequence += 1;
                let sequence = *sequence;
                let count = [1, 1, 1, 3][self.random.below(4) as usize];
                let records = (0..count).map(|n| format!("{writer}/{sequence}/{n}")).collect();
                let of_run =
                    self.fold.runs.iter().find(|(_, run)| !run.over && run.holder.as_deref() == Some(writer.as_str()));
                let run = of_run.map(|(id, _)| id.clone()).filter(|_| sequence.is_multiple_of(2));
                let stream = Some(if sequence.is_multiple_of(3) { "side".to_owned() } else { "main".to_owned() });
                self.invoke(&writer, Call::Append { session, producer, epoch, sequence, records, stream, run });
            }
            6 => {
                // What is on its way under the older epoch would be decided behind the new one.
                let on_its_way =
                    |pending: &Pending| matches!(&pending.call, Call::Append { producer: of, .. } if *of == producer);
                if !self.pending.iter().any(on_its_way) || self.random.below(2) == 0 {
                    self.invoke(&writer, Call::OpenProducer { session, producer });
                }
            }
            7 | 8 => {
                let key = KEYS[self.random.below(2) as usize].to_owned();
                let known = self.fold.state.get(&key).map_or(0, |(_, revision)| *revision + 1);
                let expected = [None, Some(known), Some(known + 500)][self.random.below(3) as usize];
                self.ops += 1;
                let value = format!("v{}", self.ops);
                let lasts = (self.random.below(3) == 0).then_some(1000);
                self.invoke(&writer, Call::Put { session, key, value, lasts, expected });
            }
            9 => self.invoke(&writer, Call::Increment { session, key: "n".into(), by: 3 }),
            10 => {
                let key = KEYS[self.random.below(2) as usize].to_owned();
                let known = self.fold.state.get(&key).map(|(_, revision)| *revision + 1);
                let expected = known.filter(|_| self.random.below(2) == 0);
                self.invoke(&writer, Call::Delete { session, key, expected });
            }
            11 => match self.fold.members.contains_key(&writer) {
                true => self.invoke(&writer, Call::Leave { session, author: writer.clone() }),
                false => self.invoke(&writer, Call::Join { session, author: writer.clone(), lease: None }),
            },
            12 => {
                self.ops += 1;
                let (message, text) = (format!("m{}", self.ops), format!("once {0} upon {0}", self.ops));
                self.invoke(&writer, Call::Speak { session, message, text });
            }
            _ => self.run(&writer),
        }
    }

    fn run(&mut self, writer: &str) {
        let session = "s".to_owned();
        let runs = self.fold.runs.clone();
        let held = runs.iter().find(|(_, run)| !run.over && run.holder.as_deref() == Some(writer));
        match (held, runs.iter().find(|(_, run)| !run.over && run.holder.is_none())) {
            (Some((id, run)), _) => {
                match self.random.below(4) {
                    // Whoever is kept from it loses it.
                    0 if !self.calm => {
                        self.disturb();
                        self.lose(id, run.epoch);
                    }
                    0 | 1 => self.invoke(writer, Call::ReleaseRun { session, run: id.clone() }),
                    _ => self.invoke(writer, Call::EndRun { session, run: id.clone() }),
                }
            }
            (None, Some((id, _))) => self.invoke(writer, Call::TakeRun { session, run: id.clone() }),
            (None, None) => {
                self.ops += 1;
                self.invoke(writer, Call::StartRun { session, run: format!("r{}", self.ops), lease: None });
            }
        }
    }

    /// Something is in the way of everybody.
    fn disturb(&mut self) {
        self.say("world", Event::Provoked { what: "loss".into(), count: 1 });
    }

    fn lose(&mut self, run: &str, epoch: u64) {
        let (run, epoch) = (Some(run.to_owned()), Some(epoch));
        self.store("server", Record { kind: "run.lost".into(), run, epoch, ..Record::default() });
    }

    /// A value goes by itself that was not to last.
    fn expire(&mut self) {
        let due = self.passing.iter().filter(|(_, at)| **at < self.at);
        let passing: Vec<String> = due.map(|(key, _)| key.clone()).collect();
        let Some(key) = self.random.pick(&passing) else { return };
        self.passing.remove(&key);
        self.store("server", Record { kind: "state.expired".into(), key: Some(key), ..Record::default() });
    }

    /// Stores a record and returns its seq.
    fn store(&mut self, author: &str, record: Record) -> u64 {
        let seq = self.log.len() as u64;
        let stream = if record.stream.is_empty() { "main".to_owned() } else { record.stream.clone() };
        let record = Record { seq, author: author.into(), stream, time: Some(time(self.at)), ..record };
        self.fold.add(&record);
        self.log.push(record);
        seq
    }

    fn decide(&mut self) {
        let undecided: Vec<usize> =
            (0..self.pending.len()).filter(|index| self.pending[*index].answer.is_none()).collect();
        let Some(index) = self.random.pick(&undecided) else { return };
        // Appends of one writer are decided in their order.
        let (process, call) = (self.pending[index].process.clone(), self.pending[index].call.clone());
        let earlier = |pending: &Pending| pending.process == process && pending.answer.is_none();
        let index = if matches!(call, Call::Append { .. }) {
            let first = self.pending.iter().position(earlier).expect("itself");
            if !matches!(self.pending[first].call, Call::Append { .. }) { return } else { first }
        } else {
            index
        };
        let call = self.pending[index].call.clone();
        let answer = self.do_it(&process, &call);
        self.pending[index].answer = Some(answer);
    }

    fn do_it(&mut self, process: &str, call: &Call) -> Result<Option<u64>, &'static str> {
        let state = |kind: &str, key: &str, value: Option<String>| Record {
            kind: kind.into(),
            key: Some(key.into()),
            value,
            ..Record::default()
        };
        let kind = |kind: &str| Record { kind: kind.into(), ..Record::default() };
        let seq = match call {
            Call::Signal { .. } => unreachable!("the sides alone signal"),
            Call::OpenProducer { producer, .. } => {
                let epoch = self.epochs.entry(producer.clone()).or_default();
                *epoch += 1;
                self.held.insert((process.to_owned(), producer.clone()), *epoch);
                return Ok(Some(*epoch));
            }
            Call::Append { producer, epoch, records, stream, run, .. } => {
                if self.epochs.get(producer) != Some(epoch) {
                    return Err("FENCED");
                }
                if let Some(run) = run
                    && self.fold.runs.get(run).is_none_or(|run| run.over || run.holder.as_deref() != Some(process))
                {
                    return Err("RUN_FENCED");
                }
                let first = self.log.len() as u64;
                *self.batches.entry(producer.clone()).or_default() += 1;
                for text in records {
                    let (data, stream, run) = (Some(text.clone()), stream.clone().unwrap_or_default(), run.clone());
                    self.store(process, Record { data, stream, run, ..kind("data") });
                }
                first
            }
            Call::Put { key, value, lasts, expected, .. } => {
                let revision = self.fold.state.get(key).map_or(0, |(_, revision)| *revision + 1);
                if expected.is_some_and(|expected| expected != revision) {
                    return Err("CONFLICT");
                }
                match lasts {
                    Some(lasts) => self.passing.insert(key.clone(), self.at + lasts * 1_000_000),
                    None => self.passing.remove(key),
                };
                self.store(process, state("state.put", key, Some(value.clone())))
            }
            Call::Speak { message, text, .. } => {
                let part = |kind: &str, data: Option<&str>| Record {
                    kind: kind.into(),
                    message: Some(message.clone()),
                    data: data.map(str::to_owned),
                    ..Record::default()
                };
                let (one, two) = text.split_at(text.len() / 2);
                self.store(process, part("message.start", None));
                self.store(process, part("message.append", Some(one)));
                self.store(process, part("message.append", Some(two)));
                self.store(process, Record { status: Some("complete".into()), ..part("message.end", None) })
            }
            Call::Delete { key, expected, .. } => {
                let revision = self.fold.state.get(key).map_or(0, |(_, revision)| *revision + 1);
                if expected.is_some_and(|expected| expected != revision) {
                    return Err("CONFLICT");
                }
                self.passing.remove(key);
                self.store(process, state("state.deleted", key, None))
            }
            Call::Increment { key, by, .. } => {
                let old: i64 = self.fold.state.get(key).map_or(0, |(value, _)| value.parse().expect("a number"));
                self.store(process, state("state.put", key, Some((old + by).to_string())))
            }
            Call::Join { author, .. } => match self.fold.members.contains_key(author) {
                true => return Err("CONFLICT"),
                false => self.store(author, kind("presence.joined")),
            },
            Call::Leave { author, .. } => {
                let generation = self.fold.members.get(author).copied();
                if generation.is_none() {
                    return Err("CONFLICT");
                }
                self.store(author, Record { member: Some(author.clone()), generation, ..kind("presence.left") })
            }
            Call::StartRun { run, .. } => self.store(process, Record { run: Some(run.clone()), ..kind("run.start") }),
            Call::TakeRun { run, .. } => match self.fold.runs.get(run).cloned() {
                Some(known) if known.holder.is_none() && !known.over => {
                    let lost_epoch = Some(known.epoch);
                    self.store(process, Record { run: Some(run.clone()), lost_epoch, ..kind("run.start") })
                }
                _ => return Err("RUN_FENCED"),
            },
            Call::ReleaseRun { run, .. } => {
                if let Some(known) = self.fold.runs.get(run)
                    && known.holder.as_deref() == Some(process)
                    && !known.over
                {
                    let epoch = known.epoch;
                    self.lose(run, epoch);
                }
                return Ok(None);
            }
            Call::EndRun { run, .. } => match self.fold.runs.get(run) {
                Some(known) if known.holder.as_deref() == Some(process) && !known.over => {
                    self.store(process, Record { run: Some(run.clone()), ..kind("run.end") })
                }
                _ => return Err("RUN_FENCED"),
            },
            Call::Attach { .. } | Call::AttachAt { .. } | Call::Trim { .. } | Call::DeleteSession { .. } => {
                unreachable!("nobody asks for it")
            }
        };
        Ok(Some(seq))
    }

    fn answer(&mut self) {
        let decided: Vec<usize> =
            (0..self.pending.len()).filter(|index| self.pending[*index].answer.is_some()).collect();
        let Some(index) = self.random.pick(&decided) else { return };
        let Pending { op, process, answer, .. } = self.pending.remove(index);
        let unknown = !self.calm && self.random.below(8) == 0;
        if unknown {
            self.disturb();
        }
        let answer = match answer.expect("decided") {
            _ if unknown => Event::Unknown { op },
            Ok(seq) => Event::Ok { op, seq },
            Err(code) => Event::Fail { op, code: code.into() },
        };
        self.say(&process, answer);
    }

    fn subscribe(&mut self) {
        let number = self.readers.len() as u64;
        let filter = match number % 3 {
            1 => Filter { streams: vec!["side".into()], kinds: Vec::new() },
            2 => Filter { streams: Vec::new(), kinds: vec!["data".into()] },
            _ => Filter::default(),
        };
        let (process, view) = (format!("reader-{number}"), number == 3);
        self.readers.push(Reader { number, process, filter, next: 0, view, begun: false });
    }

    fn deliver(&mut self) {
        let all: Vec<usize> = (0..self.readers.len()).collect();
        let Some(index) = self.random.pick(&all) else { return };
        let most = self.random.below(6) + 1;
        self.deliver_to(index, most);
    }

    fn deliver_to(&mut self, index: usize, most: u64) {
        let tail = self.log.len() as u64;
        let Reader { number, process, filter, next, view, begun } = &mut self.readers[index];
        let (subscription, view, process) = (*number, *view, process.clone());
        if !*begun {
            *begun = true;
            let from = match (view, subscription % 3) {
                (true, _) => Begin::View,
                (_, 0) => Begin::Earliest,
                (_, 1) => Begin::Latest,
                _ => Begin::Last(3),
            };
            *next = match from {
                Begin::Earliest => 0,
                Begin::Last(count) => tail.saturating_sub(count),
                _ => tail,
            };
            let (session, incarnation, filter, next) = ("s".to_owned(), "i".to_owned(), filter.clone(), *next);
            let asked = self.at;
            let started =
                Event::Started { subscription, session, incarnation, next, tail, asked, from: Some(from), filter };
            self.say(&process, started);
            if view {
                self.say(&process, Event::Skipped { subscription, next, hash: Some(format!("h{next}")) });
            }
            return;
        }
        let (from, to) = (*next, (*next + most).min(tail));
        *next = to;
        if from == to {
            return self.say(&process, Event::CaughtUp { subscription, tail });
        }
        let passing = self.log[from as usize..to as usize].iter().filter(|record| filter.passes(record));
        let records = passing.cloned().collect();
        self.say(&process, Event::Records { subscription, from, next: to, records });
        if self.random.below(5) == 0 {
            self.say(&process, Event::Resumed { subscription, verdict: "exact".into(), next: to });
        }
    }

    /// Somebody has a view.
    fn look(&mut self) {
        let Fold { state, members, messages, .. } = self.fold.clone();
        let next = self.log.len() as u64;
        let view = View { state, members, messages, hash: Some(format!("h{next}")) };
        let (session, incarnation, asked, hash) = ("s".to_owned(), "i".to_owned(), self.at, format!("h{next}"));
        let positions = self.epochs.iter().map(|(producer, epoch)| {
            let next = self.batches.get(producer).copied().unwrap_or(0);
            Position { producer: producer.clone(), epoch: *epoch, next }
        });
        let positions = positions.collect();
        self.say("looker", Event::Attached { session, incarnation, tail: next, asked, hash, positions });
        self.say("looker", Event::View { session: "s".into(), incarnation: "i".into(), next, view });
    }

    /// Everybody comes to rest.
    fn end(mut self) -> Vec<Entry> {
        while self.pending.iter().any(|pending| pending.answer.is_none()) {
            let before = self.pending.iter().filter(|pending| pending.answer.is_none()).count();
            self.decide();
            let after = self.pending.iter().filter(|pending| pending.answer.is_none()).count();
            if !self.calm && before == after && self.random.below(50) == 0 {
                // What never was decided may have been anything.
                self.disturb();
                self.pending.retain(|pending| pending.answer.is_some());
            }
        }
        while !self.pending.is_empty() {
            self.answer();
        }
        if self.readers.is_empty() {
            self.subscribe();
        }
        for index in 0..self.readers.len() {
            for _ in 0..3 {
                self.deliver_to(index, u64::MAX / 2);
            }
        }
        let (records, tail) = (self.log.clone(), self.log.len() as u64);
        self.say("everybody", Event::Quiet { session: "s".into(), tail });
        let (session, incarnation) = ("s".to_owned(), "i".to_owned());
        let hash = Some(format!("h{tail}"));
        self.say("last", Event::Final { session, incarnation, first: 0, tail, compacted: false, hash, records });
        self.entries
    }
}
