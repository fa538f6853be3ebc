//! S1–S10: what is delivered.

use std::collections::BTreeMap;

use crate::evidence::{Evidence, Life, Operation, Subscription, is_part};
use crate::history::{Begin, Event};
use crate::verdict::{Class, Verdict};

/// Checks all subscriptions.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let acknowledged = Acknowledged::of(evidence);
    told(evidence, verdict);
    beyond(evidence, verdict);
    for attached in &evidence.attached {
        let known = acknowledged.before(attached.session, attached.asked);
        if let Some(known) = known.filter(|known| attached.tail <= *known) {
            verdict.report(Class::StaleRead, attached.session, || {
                format!(
                    "{} was told the tail {}, and seq {known} was acknowledged before",
                    attached.process, attached.tail
                )
            });
        }
    }
    for (number, subscription) in &evidence.subscriptions {
        let Some(life) = evidence.lives.get(&(subscription.session, subscription.incarnation)) else { continue };
        let trims = evidence.trims(subscription.session).collect();
        Following { number: *number, subscription, life, next: None, left: false, restarted: true, owed: false, trims }
            .follow(evidence, &acknowledged, verdict);
    }
}

/// S6: what a process is told of a session never lies behind what it was told of it before.
fn told(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    type Moments = Vec<(u64, u64)>;
    // By process and life: up to where it knew the session, and when; and what tail it was told, and when it asked for that.
    let mut all: BTreeMap<(&str, &str, &str), (Moments, Moments)> = BTreeMap::new();
    for attached in &evidence.attached {
        let of = all.entry((attached.process, attached.session, attached.incarnation)).or_default();
        of.0.push((attached.at, attached.tail));
        of.1.push((attached.asked, attached.tail));
    }
    for subscription in evidence.subscriptions.values() {
        let of = all.entry((subscription.process, subscription.session, subscription.incarnation)).or_default();
        for (at, event) in &subscription.events {
            match event {
                Event::Started { tail, .. } => {
                    of.0.push((*at, *tail));
                    of.1.push((subscription.asked, *tail));
                }
                Event::Records { next, .. } => of.0.push((*at, *next)),
                Event::CaughtUp { tail, .. } => of.0.push((*at, *tail)),
                _ => {}
            }
        }
    }
    for ((process, session, _), (mut known, mut asked)) in all {
        known.sort_unstable();
        asked.sort_unstable();
        let mut known = known.into_iter().peekable();
        let mut reach = 0;
        for (asked, tail) in asked {
            while let Some((_, next)) = known.next_if(|(at, _)| *at < asked) {
                reach = reach.max(next);
            }
            if tail < reach {
                verdict.report(Class::NonmonotonicRead, session, || {
                    format!("{process} knew everything below {reach}, and was told the tail {tail} then")
                });
            }
        }
    }
}

/// L7: what anybody was told to be there is there at the end.
fn beyond(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let end = |session: &str, incarnation: &str| {
        let life = evidence.lives.get(&(session, incarnation))?;
        life.complete.iter().map(|complete| complete.tail).max()
    };
    let attached = evidence.attached.iter().map(|of| (of.session, of.incarnation, of.tail, of.process));
    let viewed = evidence.views.iter().map(|of| (of.session, of.incarnation, of.next, of.process));
    let followed = evidence.subscriptions.values().flat_map(|of| {
        let told = of.events.iter().filter_map(|(_, event)| match event {
            Event::Started { tail, .. } | Event::CaughtUp { tail, .. } => Some(*tail),
            Event::Records { next, .. } | Event::Skipped { next, .. } => Some(*next),
            _ => None,
        });
        told.max().map(|told| (of.session, of.incarnation, told, of.process))
    });
    let deleted: Vec<&str> = evidence.deletions().collect();
    for (session, incarnation, told, process) in attached.chain(viewed).chain(followed) {
        if deleted.contains(&session) {
            continue;
        }
        if let Some(end) = end(session, incarnation).filter(|end| *end < told) {
            verdict.report(Class::Vanished, session, || format!("{process} was told of {told}, and it ends at {end}"));
        }
    }
}

/// How far sessions were acknowledged, and when.
struct Acknowledged<'a>(BTreeMap<&'a str, Vec<(u64, u64)>>);

impl<'a> Acknowledged<'a> {
    fn of(evidence: &Evidence<'a>) -> Self {
        let deleted: Vec<&str> = evidence.deletions().collect();
        let mut sessions: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
        let stored = |operation: &Operation<'_>| Some((operation.returned, operation.stored()?));
        for operation in &evidence.operations {
            let session = operation.call.session();
            if let (Some(answer), false) = (stored(operation), deleted.contains(&session)) {
                sessions.entry(session).or_default().push(answer);
            }
        }
        for answers in sessions.values_mut() {
            answers.sort_unstable();
            let mut latest = 0;
            for (_, seq) in answers {
                latest = latest.max(*seq);
                *seq = latest;
            }
        }
        Self(sessions)
    }

    /// The latest seq that was acknowledged before this moment.
    fn before(&self, session: &str, at: u64) -> Option<u64> {
        let answers = self.0.get(session)?;
        let count = answers.partition_point(|(returned, _)| *returned < at);
        Some(answers[..count].last()?.1)
    }
}

/// One subscription, followed from event to event.
struct Following<'e, 'a> {
    number: u64,
    subscription: &'e Subscription<'a>,
    life: &'e Life<'a>,
    /// The next seq; `None` before it has begun.
    next: Option<u64>,
    left: bool,
    /// Nothing was delivered since it began.
    restarted: bool,
    /// A view was asked for, and has not come.
    owed: bool,
    /// When it was asked for that what is below a seq be given up.
    trims: Vec<(u64, u64)>,
}

impl Following<'_, '_> {
    fn follow(mut self, evidence: &Evidence<'_>, acknowledged: &Acknowledged<'_>, verdict: &mut Verdict) {
        for (at, event) in &self.subscription.events {
            self.event(*at, event, acknowledged, verdict);
        }
        let end = evidence.quiet.get(self.subscription.session);
        if let (Some((_, end)), false) = (end, self.left)
            && !evidence.gone.contains_key(self.subscription.process)
            && self.next.is_some_and(|next| next < *end)
        {
            self.report(Class::Lagging, verdict, || format!("at {:?} of {end}", self.next));
        }
    }

    /// What anybody had asked for until then to be given up.
    fn given_up(&self, at: u64) -> u64 {
        let asked = self.trims.iter().filter(|(asked, _)| *asked < at);
        asked.map(|(_, before)| *before).max().unwrap_or(0)
    }

    fn report(&self, class: Class, verdict: &mut Verdict, what: impl FnOnce() -> String) {
        let (number, process) = (self.number, self.subscription.process);
        verdict.report(class, self.subscription.session, || format!("subscription {number} of {process}: {}", what()));
    }

    fn event(&mut self, at: u64, event: &Event, acknowledged: &Acknowledged<'_>, verdict: &mut Verdict) {
        let next = self.next.unwrap_or_default();
        match event {
            Event::Started { next: begins, tail, incarnation, from, .. } => {
                self.owed = *from == Some(Begin::View);
                // Only what was given up is not there.
                let first = self.given_up(at);
                let right = from.is_none_or(|from| match from {
                    Begin::Earliest => *begins <= first,
                    Begin::Latest | Begin::View => begins == tail,
                    Begin::Last(count) => {
                        let wanted = tail.saturating_sub(count);
                        *begins == wanted || (wanted..=first).contains(begins)
                    }
                    Begin::Seq(seq) => *begins == seq,
                });
                if !right {
                    self.report(Class::WrongResume, verdict, || {
                        format!("begins at {begins} of {tail}, and {from:?} was asked for")
                    });
                }
                if !self.restarted {
                    self.report(Class::NonmonotonicDelivery, verdict, || "began again behind deliveries".into());
                }
                if incarnation != self.subscription.incarnation {
                    self.report(Class::MixedTimelines, verdict, || format!("began again in {incarnation}"));
                }
                let known = acknowledged.before(self.subscription.session, self.subscription.asked);
                if let Some(known) = known.filter(|known| *tail <= *known) {
                    self.report(Class::StaleRead, verdict, || {
                        format!("tail {tail}, and seq {known} was acknowledged before")
                    });
                }
                self.next = Some(*begins);
            }
            Event::Records { from, next: to, records, .. } => {
                if *from < next {
                    self.report(Class::NonmonotonicDelivery, verdict, || format!("from {from} where {next} is due"));
                    if let Some(again) = records.iter().find(|record| (*from..next).contains(&record.seq)) {
                        self.report(Class::Redelivered, verdict, || format!("{again:?} where {next} is due"));
                    }
                } else if *from > next {
                    self.report(Class::SkippedDelivery, verdict, || format!("from {from} where {next} is due"));
                }
                if self.owed {
                    self.report(Class::SkippedDelivery, verdict, || "records, and the view was to come first".into());
                }
                self.records(*from, *to, records, verdict);
                self.next = Some(next.max(*to));
                self.restarted = false;
            }
            Event::Gap { from, to, .. } => {
                verdict.count("gaps", 1);
                let given_up = self.given_up(at);
                if *to > given_up {
                    self.report(Class::SkippedDelivery, verdict, || {
                        format!("a gap up to {to}, and nobody had given up more than what is below {given_up}")
                    });
                }
                if *from > next {
                    self.report(Class::SkippedDelivery, verdict, || format!("gap from {from} where {next} is due"));
                }
                self.next = Some(next.max(*to));
            }
            Event::Skipped { next: to, .. } => {
                verdict.count("snapshots", 1);
                if !self.owed {
                    self.report(Class::SkippedDelivery, verdict, || format!("a view at {to}, which was not asked for"));
                }
                self.owed = false;
                if *to < next {
                    self.report(Class::NonmonotonicDelivery, verdict, || format!("a view at {to} where {next} is due"));
                }
                self.next = Some(*to);
            }
            Event::CaughtUp { tail, .. } => {
                verdict.count("caught-up", 1);
                if next < *tail {
                    self.report(Class::FalseCaughtUp, verdict, || format!("tail {tail}, delivered up to {next}"));
                }
            }
            Event::Resumed { verdict: said, next: to, .. } => {
                verdict.count("resumes", 1);
                verdict.count(&format!("resumes-{said}"), 1);
                if said == "exact" && *to != next {
                    self.report(Class::WrongResume, verdict, || format!("exact at {to}, was at {next} at {at}"));
                }
                // What was given up comes as a gap, what was put together as records.
                if *to > next {
                    self.report(Class::SkippedDelivery, verdict, || format!("resumed at {to} ({said}), was at {next}"));
                }
                if *to < next {
                    self.report(Class::NonmonotonicDelivery, verdict, || format!("resumed at {to}, was at {next}"));
                }
                self.next = Some(*to);
            }
            Event::Left { .. } => self.left = true,
            _ => {}
        }
    }

    fn records(&self, from: u64, to: u64, records: &[crate::history::Record], verdict: &mut Verdict) {
        let filter = self.subscription.filter;
        let mut due = from;
        for record in records {
            if record.seq < due {
                let class = if record.seq < from { Class::NonmonotonicDelivery } else { Class::Redelivered };
                self.report(class, verdict, || format!("seq {} where {due} is due", record.seq));
                continue;
            }
            if !filter.passes(record) {
                self.report(Class::FilterLeaked, verdict, || format!("{record:?}"));
            }
            self.passed_over(due, record.seq, verdict);
            due = record.seq.saturating_add(1);
        }
        if due > to {
            self.report(Class::NonmonotonicDelivery, verdict, || format!("seq {} behind its end {to}", due - 1));
        }
        self.passed_over(due, to, verdict);
    }

    /// Nothing was delivered of these seqs, though they were covered.
    fn passed_over(&self, from: u64, to: u64, verdict: &mut Verdict) {
        if from >= to {
            return;
        }
        let filter = self.subscription.filter;
        for (seq, seen) in self.life.seen.range(from..to) {
            let put_together = self.life.compacted && is_part(&seen.record.kind);
            if filter.passes(seen.record) && !put_together {
                let class = if filter.is_open() { Class::SkippedDelivery } else { Class::FilterMissed };
                self.report(class, verdict, || format!("seq {seq} was covered and not delivered: {:?}", seen.record));
            }
        }
    }
}
