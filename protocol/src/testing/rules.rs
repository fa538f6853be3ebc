//! The rules of a connection, driven by arbitrary events: its path, its credit, its readers, its leases, its grants.

use core::time::Duration;
use std::collections::BTreeMap;

use bytes::Bytes;

use super::digest::Digest;
use crate::error::Code;
use crate::registry::FOLD_VERSION;
use crate::session::{
    CreditReceived, CreditSent, Delegator, Grant, Grants, Leases, Manners, Operation, PathFacts, Progress, Roaming,
    RoamingStep, Verdict, moved_reason, moved_to, sent_on_to,
};
use crate::wire::{Label, Snapshot, Subject};

/// Choices, until there are none.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self, below: u64) -> Option<u64> {
        Some((u64::from(self.byte()?) << 8 | u64::from(self.byte()?)) % below.max(1))
    }
}

/// Whatever happens to a path: the machine comes to rest, and says when it wants to be asked again.
fn path(choices: &mut Choices<'_>, digest: &mut Digest) -> Option<()> {
    let manners = |number: u8| match number % 3 {
        0 => Manners::foreground(Duration::from_secs(5)),
        1 => Manners::background(Some(Duration::from_secs(25))),
        _ => Manners::background(None),
    };
    let mut now = Duration::ZERO;
    let mut roaming = Roaming::new(manners(choices.byte()?), now);
    let mut facts = PathFacts { rtt: Duration::from_millis(choices.number(400)?), ..PathFacts::default() };
    let mut trying = false;
    loop {
        now += Duration::from_millis(choices.number(3000)?);
        let random = (choices.number(1 << 16)? << 16) as u32;
        match choices.byte()? % 16 {
            0 => roaming.network_changed(now),
            1 => roaming.woken(now),
            2 => roaming.going_away(now, Duration::from_millis(choices.number(5000)?), random),
            3 => roaming.lost(now, choices.byte()? % 2 == 0, random),
            4 if trying => roaming.ready(),
            5 if trying => {
                trying = false;
                roaming.failed(now, random);
            }
            6 => roaming.set_manners(manners(choices.byte()?)),
            7 => facts.heard += 1,
            8 => (facts.heard, facts.news) = (facts.heard + 1, facts.news + 1),
            9 => facts.expecting = !facts.expecting,
            10 => facts.uploading = !facts.uploading,
            11 => facts.used = !facts.used,
            12 => facts.rtt = Duration::from_millis(choices.number(2000)?),
            _ => {}
        }
        let mut steps = 0;
        while let Some(step) = roaming.step(now, &facts, random) {
            steps += 1;
            assert!(steps < 32, "it does not come to rest: {step:?}");
            digest.add(step);
            match step {
                // Sometimes it is answered.
                RoamingStep::Ask(nonce) | RoamingStep::Rebind { nonce, .. } if choices.byte()? % 2 == 0 => {
                    (facts.answered, facts.heard) = (nonce, facts.heard + 1);
                }
                RoamingStep::Challenge { .. } => trying = true,
                RoamingStep::Withdraw | RoamingStep::Move => trying = false,
                _ => {}
            }
        }
        digest.add((
            roaming.in_doubt(),
            roaming.is_leaving(),
            roaming.doubted_for(now),
            roaming.listens(now, facts.rtt),
        ));
        digest.add(roaming.due(&facts));
        if let Some(due) = roaming.due(&facts) {
            assert!(due < now + Duration::from_secs(3600), "it asks again in {due:?} at {now:?}");
        }
    }
}

/// Never more on the way than the window, and never less credited than was.
fn credit(choices: &mut Choices<'_>, digest: &mut Digest) -> Option<()> {
    let window = 4096 + choices.number(60_000)?;
    let (mut sent, mut received) =
        (CreditSent::new(window, 1 + choices.number(4)?, 1 << 20), CreditReceived::new(window));
    assert!(sent.window() <= window && received.window() == window);
    let (mut all, mut consumed) = (0, 0);
    loop {
        let some = choices.number(5000)?;
        match choices.byte()? % 3 {
            0 => {
                let some = some.min(sent.available());
                sent.sent(some);
                all += some;
            }
            1 => {
                let some = some.min(all - consumed);
                consumed += some;
                let told = received.consumed(some);
                digest.add(told);
                if let Some(told) = told {
                    assert!(told <= all, "no more than was sent");
                    sent.credited(told).expect("what was sent");
                }
            }
            _ => {
                let told = sent.clone().credited(all + 1 + some);
                assert_eq!(told.map_err(|error| error.code), Err(Code::CREDIT_EXCEEDED));
            }
        }
        assert!(sent.available() <= sent.window());
        digest.add((sent.available(), sent.window()));
    }
}

/// Whatever a server sends: a reader moves on, or says what is wrong.
fn reader(choices: &mut Choices<'_>, digest: &mut Digest) -> Option<()> {
    let mut progress = Progress::new(choices.byte()? % 2 == 0, choices.byte()? % 2 == 0);
    loop {
        let (one, two) = (choices.number(20)?, choices.number(20)?);
        let before = progress.next();
        match choices.byte()? % 5 {
            0 => {
                let verdict =
                    [Verdict::Exact, Verdict::Snapshot, Verdict::Gap, Verdict::Gone][usize::from(choices.byte()? % 4)];
                digest.add(progress.subscribed(verdict, one, two).map_err(|error| error.code));
            }
            1 => {
                let part = Bytes::copy_from_slice(&choices.0[..choices.0.len().min(one as usize)]);
                let version = if two % 4 == 0 { two } else { FOLD_VERSION };
                let taken = progress.snapshot(&Snapshot { next: one, fold_version: version, length: two, part });
                digest.add(taken.map(|view| view.map(|view| view.hash())).map_err(|error| error.code));
            }
            2 => {
                let covered = progress.covered(one, two);
                digest.add(covered.as_ref().map_err(|error| error.code));
                match covered {
                    Ok(()) => assert!(one == before && progress.next() == two && two >= one),
                    Err(_) => assert_eq!(progress.next(), before, "what is refused moves nothing"),
                }
            }
            3 => progress.tail(one),
            _ => digest.add(progress.caught_up()),
        }
        digest.add((progress.next(), progress.has_started()));
    }
}

/// What is held lapses when nothing was heard of it, and not before.
fn leases(choices: &mut Choices<'_>, digest: &mut Digest) -> Option<()> {
    let mut leases: Leases<u8> = Leases::default();
    let (mut now, mut held) = (0, BTreeMap::new());
    loop {
        now += choices.number(2000)?;
        let (key, generation) = (choices.byte()? % 4, u64::from(choices.byte()? % 3));
        match choices.byte()? % 4 {
            0 => {
                held.insert(key, (generation, 1 + choices.number(5000)?));
            }
            1 => drop(held.remove(&key)),
            2 => leases.hasten(&key, generation, (now, now + choices.number(600)?)),
            _ => {}
        }
        leases.follow(now, held.iter().map(|(key, (generation, lasts))| (*key, *generation, *lasts)));
        let heard = choices.number(4000)?;
        let due = leases.deadline();
        let lapsed = leases.lapsed(now, |of, _| (*of == key).then_some(now.saturating_sub(heard)));
        assert!(lapsed.is_empty() || due.is_some_and(|due| due <= now), "nothing lapses before its time");
        assert_eq!(leases.is_empty(), held.is_empty());
        digest.add((due, lapsed, leases.deadline()));
    }
}

/// What is made of a token never allows what that does not.
fn grants(choices: &mut Choices<'_>, digest: &mut Digest) -> Option<()> {
    const TEXTS: [&str; 8] = ["", "a", "a/", "a/b", "ab", "a:b", "b", "a/b/c"];
    let text = |choices: &mut Choices<'_>| Some(TEXTS[usize::from(choices.byte()? % 8)]);
    let some = |choices: &mut Choices<'_>| {
        let mut grants = Vec::new();
        for _ in 0..1 + choices.byte()? % 3 {
            let bits = choices.number(1 << Operation::ALL.len())?;
            let operations = Operation::ALL.into_iter().filter(|one| bits & 1 << *one as u64 != 0).collect();
            grants.push(Grant { prefix: text(choices)?.into(), operations });
        }
        Some(Grants(grants))
    };
    loop {
        let (own, wanted) = (some(choices)?, some(choices)?);
        let subject = Subject::new("alice").expect("a subject");
        let (expires, lasts) = (choices.number(2000)? as i64, choices.number(2000)?);
        let delegator =
            Delegator { subject: &subject, grants: &own, expires, depth: usize::from(choices.byte()? % 10) };
        let name = Label::new("tool").expect("a name");
        let made = delegator.delegate(&name, &wanted, lasts, 1000);
        digest.add(made.as_ref().map_err(|refusal| refusal.code));
        if let Ok(made) = made {
            assert!(made.expires <= expires && made.expires > 1000);
            for name in TEXTS.iter().skip(1).chain(&["x", "a/b/d"]) {
                for operation in Operation::ALL {
                    assert!(!wanted.allow(operation, name) || own.allow(operation, name), "{own:?} {wanted:?} {name}");
                }
            }
        }
    }
}

/// What is said in words: where a server has moved to, and codes.
fn words(choices: &mut Choices<'_>, digest: &mut Digest) -> Option<()> {
    let text = String::from_utf8_lossy(choices.0).into_owned();
    if let Some(address) = moved_to(&text) {
        assert_eq!(moved_to(&moved_reason(Some(address))), Some(address));
        digest.add((address, sent_on_to(Some(address), address)));
    }
    let code = Code(choices.number(0x80)?);
    digest.add((code.to_string(), code.scope(), code.advice(), code.is_retryable(), code.retry_after(u64::MAX)));
    None
}

/// Chooses a rule by the first byte, and drives it with the others.
///
/// # Panics
///
/// If a rule does not hold.
pub fn run(bytes: &[u8]) {
    play(bytes, Digest::default());
}

/// What it comes to, as a hash of everything that the rules said.
///
/// # Panics
///
/// If a rule does not hold.
pub fn digest(bytes: &[u8]) -> String {
    play(bytes, Digest::new()).finish()
}

fn play(bytes: &[u8], mut digest: Digest) -> Digest {
    let mut choices = Choices(bytes);
    let rules = [path, credit, reader, leases, grants, words];
    if let Some(which) = choices.byte() {
        let _ = rules[usize::from(which) % rules.len()](&mut choices, &mut digest);
    }
    digest
}
