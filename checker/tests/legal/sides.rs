//! What a faultless service does beside: sessions that are trimmed, put together, deleted and made again, and members that die.

use mainstay_checker::history::{Begin, Call, Entry, Event, Filter, Record};

use super::{Random, TICK, time};

/// One session, and one process after the other.
struct Side<'r> {
    random: &'r mut Random,
    session: &'static str,
    at: u64,
    /// Names of operations and subscriptions begin here.
    named: u64,
    incarnation: String,
    entries: Vec<Entry>,
    first: u64,
    tail: u64,
    log: Vec<Record>,
}

impl<'r> Side<'r> {
    fn new(random: &'r mut Random, session: &'static str, named: u64) -> Self {
        let incarnation = format!("{session}-1");
        Self { random, session, at: 1, named, incarnation, entries: Vec::new(), first: 0, tail: 0, log: Vec::new() }
    }

    fn say(&mut self, process: &str, event: Event) -> u64 {
        self.at += TICK / 2 + self.random.below(TICK);
        self.entries.push(Entry { at: self.at, process: process.to_owned(), event });
        self.at
    }

    /// Asks for something, and is answered.
    fn ask(&mut self, process: &str, call: Call, answer: Result<Option<u64>, &str>) {
        self.named += 1;
        let op = self.named;
        self.say(process, Event::Invoke { op, call });
        let answer = match answer {
            Ok(seq) => Event::Ok { op, seq },
            Err(code) => Event::Fail { op, code: code.into() },
        };
        self.say(process, answer);
    }

    fn store(&mut self, author: &str, kind: &str, record: Record) -> u64 {
        let seq = self.tail;
        self.tail += 1;
        let (author, kind, stream, time) = (author.to_owned(), kind.to_owned(), "main".to_owned(), Some(time(self.at)));
        self.log.push(Record { seq, author, kind, stream, time, ..record });
        seq
    }

    fn append(&mut self, texts: &[String]) {
        let first = self.tail;
        for text in texts {
            self.store("writer", "data", Record { data: Some(text.clone()), ..Record::default() });
        }
        let (session, producer, stream) = (self.session.to_owned(), "p".to_owned(), Some("main".to_owned()));
        let (epoch, sequence, records) = (1, self.at, texts.to_vec());
        let call = Call::Append { session, producer, epoch, sequence, records, stream, run: None };
        self.ask(&format!("{}-writer", self.session), call, Ok(Some(first)));
    }

    fn start(&mut self, process: &str, next: u64) -> u64 {
        self.named += 1;
        let subscription = self.named;
        let (session, incarnation, tail) = (self.session.to_owned(), self.incarnation.clone(), self.tail);
        let (asked, from, filter) = (self.at, Some(Begin::Seq(next)), Filter::default());
        let started = Event::Started { subscription, session, incarnation, next, tail, asked, from, filter };
        self.say(process, started);
        subscription
    }

    /// Tells everything from `next` on: what was given up as a gap, and the records.
    fn deliver(&mut self, process: &str, subscription: u64, next: u64) -> u64 {
        let (first, tail) = (self.first, self.tail);
        if next < first {
            self.say(process, Event::Gap { subscription, from: next, to: first });
        }
        let from = next.max(first);
        let records: Vec<Record> = self.log.iter().filter(|record| record.seq >= from).cloned().collect();
        if from < tail {
            self.say(process, Event::Records { subscription, from, next: tail, records });
        }
        self.say(process, Event::CaughtUp { subscription, tail });
        tail
    }

    /// Reads all that is there and goes away.
    fn read(&mut self, process: &str, next: u64) {
        let subscription = self.start(process, next);
        self.deliver(process, subscription, next);
        self.say(process, Event::Left { subscription });
    }

    fn complete(mut self, compacted: bool) -> Vec<Entry> {
        let (session, incarnation) = (self.session.to_owned(), self.incarnation.clone());
        let (first, tail, records) = (self.first, self.tail, self.log.clone());
        self.say("last", Event::Final { session, incarnation, first, tail, compacted, hash: None, records });
        self.entries
    }
}

/// What is old is given up, again and again; whoever was away for long, and whoever begins there, is told of a gap. One reader sees all of it.
pub(crate) fn trimmed(random: &mut Random) -> Vec<Entry> {
    let mut side = Side::new(random, "trimmed", 1_000_000);
    let slow = side.start("slow", 0);
    let quick = side.start("quick", 0);
    let (mut next, mut read) = (0, 0);
    for round in 0..6 {
        let texts: Vec<String> = (0..1 + side.random.below(4)).map(|n| format!("trimmed/{round}/{n}")).collect();
        side.append(&texts);
        let (key, value) = ("k".to_owned(), format!("trimmed-{round}"));
        let put = Record { key: Some(key.clone()), value: Some(value.clone()), ..Record::default() };
        let seq = side.store("putter", "state.put", put);
        let (session, lasts, expected) = (side.session.to_owned(), None, None);
        side.ask("putter", Call::Put { session, key, value, lasts, expected }, Ok(Some(seq)));
        read = side.deliver("quick", quick, read);
        let before = side.first + side.random.below(side.tail - side.first + 1);
        let session = side.session.to_owned();
        side.ask("trimmer", Call::Trim { session, before }, Ok(Some(before)));
        side.first = before;
        side.log.retain(|record| record.seq >= before);
        if side.random.below(2) == 0 {
            let verdict = if next < side.first { "gap" } else { "exact" };
            side.say("slow", Event::Resumed { subscription: slow, verdict: verdict.into(), next });
            next = side.deliver("slow", slow, next);
        }
        let from = side.random.below(side.tail + 1);
        side.read("guest", from);
    }
    side.complete(false)
}

/// A session is deleted and made again; whoever goes on in the life before is told that it is over.
pub(crate) fn renewed(random: &mut Random) -> Vec<Entry> {
    let mut side = Side::new(random, "renewed", 2_000_000);
    for life in 1..4 {
        let session = side.session.to_owned();
        if life > 1 {
            side.ask("owner", Call::DeleteSession { session: session.clone() }, Ok(None));
            let over = core::mem::replace(&mut side.incarnation, format!("renewed-{life}"));
            (side.tail, side.log) = (0, Vec::new());
            side.ask("guest", Call::AttachAt { session, incarnation: over }, Err("GONE"));
        }
        let texts: Vec<String> = (0..3).map(|n| format!("renewed/{life}/{n}")).collect();
        texts.iter().for_each(|text| side.append(core::slice::from_ref(text)));
        side.read("guest", 0);
    }
    side.complete(false)
}

/// Messages are put together: whoever reads later is told so, and has a whole one in the place of its parts.
pub(crate) fn compacted(random: &mut Random) -> Vec<Entry> {
    let mut side = Side::new(random, "compacted", 3_000_000);
    for n in 0..3 {
        let part = |data: Option<&str>| Record {
            message: Some(format!("m{n}")),
            data: data.map(str::to_owned),
            ..Record::default()
        };
        let (one, two) = (format!("once {n} "), format!("upon {n}"));
        side.store("writer", "message.start", part(None));
        side.store("writer", "message.append", part(Some(&one)));
        side.store("writer", "message.append", part(Some(&two)));
        let end = side.store("writer", "message.end", part(None));
        let (session, message) = (side.session.to_owned(), format!("m{n}"));
        side.ask("writer", Call::Speak { session, message, text: one + &two }, Ok(Some(end)));
    }
    side.read("early", 0);
    let whole: Vec<u64> = side.log.iter().filter(|record| record.kind == "message.append").map(|it| it.seq).collect();
    for pair in whole.chunks(2).take(1 + side.random.below(3) as usize) {
        let text: String =
            side.log.iter().filter(|it| pair.contains(&it.seq)).filter_map(|it| it.data.clone()).collect();
        side.log.retain(|record| record.seq != pair[0]);
        let last = side.log.iter_mut().find(|record| record.seq == pair[1]).expect("the last part");
        (last.kind, last.data) = ("message.replace".into(), Some(text));
    }
    let subscription = side.start("late", 0);
    side.say("late", Event::Compacted { subscription });
    side.deliver("late", subscription, 0);
    side.complete(true)
}

/// Members come, leave, and die; who dies has left when its lease is over.
pub(crate) fn members(random: &mut Random) -> Vec<Entry> {
    let mut side = Side::new(random, "members", 4_000_000);
    let (reader, mut next) = (side.start("witness", 0), 0);
    for n in 0..4 {
        let author = format!("member-{n}");
        let generation = side.store(&author, "presence.joined", Record::default());
        let (session, lease) = (side.session.to_owned(), Some(50 * TICK));
        side.ask(&author, Call::Join { session: session.clone(), author: author.clone(), lease }, Ok(Some(generation)));
        next = side.deliver("witness", reader, next);
        let dies = side.random.below(2) == 0;
        if dies {
            side.say(&author, Event::Gone {});
        }
        let (member, generation) = (Some(author.clone()), Some(generation));
        side.store("server", "presence.left", Record { member, generation, ..Record::default() });
        if !dies {
            side.ask(&author, Call::Leave { session, author: author.clone() }, Ok(None));
        }
        next = side.deliver("witness", reader, next);
    }
    let (session, tail) = (side.session.to_owned(), side.tail);
    side.say("everybody", Event::Quiet { session, tail });
    side.complete(false)
}

/// Customers hold runs, and may want something of their own alone: also of what one below them holds, and not of one whose name begins with
/// their letters. What is taken over is another one's from then on. Beside them is somebody who may want something of everybody.
pub(crate) fn customers(random: &mut Random) -> Vec<Entry> {
    let mut side = Side::new(random, "customers", 5_000_000);
    let session = side.session.to_owned();
    let subjects = ["alice", "alicey", "alice/agent", "boss"];
    let process = |n: usize| format!("customer-{n}");
    let author = |n: usize| format!("{}/{n}", subjects[n]);
    for (n, subject) in subjects.into_iter().enumerate() {
        let signals = if subject == "boss" { "signal" } else { "signal-own" };
        let operations = ["run", signals].map(str::to_owned).to_vec();
        let (prefix, namespace, subject) = ("customers".to_owned(), String::new(), subject.to_owned());
        side.say(&process(n), Event::Granted { prefix, operations, namespace, subject });
    }
    for holder in 0..3 {
        let id = format!("owned-{holder}");
        let of_run = || Record { run: Some(id.clone()), ..Record::default() };
        let begun = side.store(&author(holder), "run.start", of_run());
        let (session_name, run) = (session.clone(), id.clone());
        side.ask(&process(holder), Call::StartRun { session: session_name, run, lease: None }, Ok(Some(begun)));
        let mut held = holder;
        for life in 0..1 + side.random.below(2) {
            if life > 0 {
                let call = Call::ReleaseRun { session: session.clone(), run: id.clone() };
                side.ask(&process(held), call, Ok(None));
                side.store("server", "run.lost", Record { epoch: Some(begun), ..of_run() });
                held = (holder + 1) % 3;
                let taken = side.store(&author(held), "run.start", Record { lost_epoch: Some(begun), ..of_run() });
                let call = Call::TakeRun { session: session.clone(), run: id.clone() };
                side.ask(&process(held), call, Ok(Some(taken)));
            }
            let mut cancel = None;
            for sender in (0..4).chain(0..4) {
                let (session, run, author) = (session.clone(), id.clone(), author(sender));
                let may = sender == 3 || sender == held || (sender, held) == (0, 2);
                let answer = match (may, sender == 3 || side.random.below(2) == 0) {
                    (false, _) => Err("FORBIDDEN"),
                    (true, true) => Ok(Some(side.store(&author, "signal.steer", of_run()))),
                    // One is enough, whoever sent it.
                    (true, false) => {
                        Ok(Some(*cancel.get_or_insert_with(|| side.store(&author, "signal.cancel", of_run()))))
                    }
                };
                side.ask(&process(sender), Call::Signal { session, run, author }, answer);
            }
            // Whom an input interrupts, and what became of a signal, is nobody's wish; an answer is for a request.
            side.store("server", "signal.interrupt", of_run());
            side.store(&author(held), "signal.resolved", of_run());
            side.store("people/1", "signal.approve", of_run());
        }
        let end = side.store(&author(held), "run.end", Record { status: Some("complete".into()), ..of_run() });
        side.ask(&process(held), Call::EndRun { session: session.clone(), run: id }, Ok(Some(end)));
    }
    side.read("auditor", 0);
    side.complete(false)
}

/// All of them.
pub(crate) fn all(random: &mut Random) -> Vec<Entry> {
    [trimmed, renewed, compacted, members, customers].into_iter().flat_map(|side| side(random)).collect()
}
