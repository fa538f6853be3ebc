//! When a client asks, changes its path, tries another connection and moves to it (spec ROAM): stated one by one, and held in random
//! worlds in which paths die and come back.

use core::time::Duration;

use mainstay_protocol::session::{Manners, PathFacts, Roaming, RoamingStep};
use proptest::prelude::*;

const RTT: Duration = Duration::from_millis(60);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn foreground() -> Manners {
    Manners::foreground(Duration::from_secs(5))
}

/// A client that is connected at time zero.
fn connected() -> (Roaming, PathFacts) {
    let mut roaming = Roaming::new(foreground(), Duration::ZERO);
    let facts = PathFacts { rtt: RTT, used: true, ..PathFacts::default() };
    assert_eq!(roaming.step(Duration::ZERO, &facts, 0), Some(RoamingStep::Challenge { hopeful: true }));
    assert_eq!(roaming.step(Duration::ZERO, &facts, 0), None);
    roaming.ready();
    assert_eq!(roaming.step(Duration::ZERO, &facts, 0), Some(RoamingStep::Move));
    let mut heard = facts;
    heard.heard = 1;
    assert_eq!(roaming.step(Duration::ZERO, &heard, 0), None);
    (roaming, heard)
}

/// All steps from `from` until `to`, each with its time, while nothing comes from the server.
fn silent(roaming: &mut Roaming, facts: &PathFacts, from: Duration, to: Duration) -> Vec<(u64, RoamingStep)> {
    let mut steps = Vec::new();
    let mut now = from;
    while now <= to {
        while let Some(step) = roaming.step(now, facts, u32::MAX / 2) {
            steps.push((now.as_millis() as u64, step));
            assert!(steps.len() < 1000, "steps without end: {:?}", &steps[990..]);
        }
        let due = roaming.due(facts).expect("something is always due in silence");
        assert!(due > now, "nothing to do at {now:?}, and due at {due:?}");
        now = due;
    }
    steps
}

#[test]
fn a_path_that_works_is_asked_ever_more_seldom_and_never_changed() {
    let (mut roaming, mut facts) = connected();
    let mut asked = Vec::new();
    let mut now = Duration::ZERO;
    while now < Duration::from_secs(120) {
        match roaming.step(now, &facts, u32::MAX / 2) {
            Some(RoamingStep::Ask(nonce)) => {
                asked.push(now.as_millis());
                now += RTT;
                (facts.heard, facts.answered) = (facts.heard + 1, nonce);
            }
            None => now = roaming.due(&facts).expect("the next question"),
            step => panic!("{step:?} of a path that works"),
        }
    }
    let pauses: Vec<u128> = asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(pauses[..4], [2060, 4060, 5060, 5060]);
    // Somewhere between the two, once.
    assert_eq!(pauses[10..14], [5060, 8802, 12_560, 12_560]);
    // Something else than answers came: it is asked sooner again.
    facts.news += 1;
    facts.heard += 1;
    assert_eq!(roaming.step(now, &facts, 0), None);
    assert_eq!(roaming.due(&facts), Some(now + ms(1000)));
}

/// What QUIC sends for itself behind an answer is noticed when the next question is due.
#[test]
fn a_late_acknowledgement_does_not_put_the_next_question_off() {
    let (mut roaming, mut facts) = connected();
    let mut now = roaming.due(&facts).expect("the first question");
    let mut last = now;
    while now < Duration::from_secs(60) {
        match roaming.step(now, &facts, 0) {
            Some(RoamingStep::Ask(nonce)) => {
                assert!(now - last <= ms(5100), "asked at {last:?}, and then at {now:?}");
                (facts.heard, facts.answered) = (facts.heard + 1, nonce);
                now += RTT;
                last = now;
                assert_eq!(roaming.step(now, &facts, 0), None);
                facts.heard += 1;
            }
            None => now = roaming.due(&facts).expect("the next question"),
            step => panic!("{step:?} of a path that works"),
        }
    }
    assert!(last > Duration::from_secs(50));
}

#[test]
fn questions_are_never_so_far_apart_that_a_nat_forgets() {
    let resting = |keep_alive| Manners::foreground(Duration::from_secs(keep_alive)).resting.as_millis();
    assert_eq!([5, 9, 20, 25, 40].map(resting), [12_500, 22_500, 25_000, 25_000, 40_000]);
    assert_eq!(Manners::background(Some(Duration::from_secs(25))).resting, Duration::from_secs(25));
}

#[test]
fn what_nobody_uses_and_what_is_in_the_background_is_left_alone() {
    let (mut roaming, mut facts) = connected();
    facts.used = false;
    assert_eq!(roaming.due(&facts), None);
    facts.used = true;
    roaming.set_manners(Manners::background(None));
    assert_eq!(roaming.due(&facts), None);
    // But whoever waits for an answer is told whether one can come.
    facts.expecting = true;
    assert_eq!(roaming.due(&facts), Some(ms(500)));
    facts.expecting = false;
    roaming.set_manners(Manners::background(Some(Duration::from_secs(25))));
    assert_eq!(roaming.due(&facts), Some(ms(25_000)));
}

#[test]
fn a_network_change_is_acted_on_at_once_and_a_second_connection_is_tried_where_the_first_stays_silent() {
    let (mut roaming, facts) = connected();
    roaming.network_changed(ms(1000));
    let steps = silent(&mut roaming, &facts, ms(1000), ms(1399));
    let [(1000, RoamingStep::Rebind { amply: true, .. }), (1250, RoamingStep::Challenge { hopeful: true })] = steps[..]
    else {
        panic!("{steps:?}")
    };
    // Ready, and the first was given its three round trips.
    roaming.ready();
    assert_eq!(roaming.step(ms(1399), &facts, 0), Some(RoamingStep::Move));
    assert!(!roaming.in_doubt());
}

/// Spec ROAM-4.
#[test]
fn who_uploads_or_was_cut_off_for_long_tries_both_at_once() {
    for (uploading, at) in [(true, 1000), (false, 3000)] {
        let (mut roaming, mut facts) = connected();
        facts.uploading = uploading;
        // The silence was long, or questions were not due yet.
        roaming.network_changed(ms(at));
        let steps = silent(&mut roaming, &facts, ms(at), ms(at));
        assert!(
            matches!(steps[..], [(_, RoamingStep::Rebind { .. }), (_, RoamingStep::Challenge { hopeful: true })]),
            "{steps:?}"
        );
        roaming.ready();
        let soon = roaming.step(ms(at + 60), &facts, 0);
        // Bytes that wait for timers that backed off do not wait for a proof that they need not.
        assert_eq!(soon, uploading.then_some(RoamingStep::Move));
        assert_eq!(roaming.step(ms(at + 180), &facts, 0), (!uploading).then_some(RoamingStep::Move));
    }
}

#[test]
fn the_first_connection_goes_on_if_it_is_heard_in_time() {
    let (mut roaming, mut facts) = connected();
    roaming.network_changed(ms(5000));
    let steps = silent(&mut roaming, &facts, ms(5000), ms(5000));
    let [(_, RoamingStep::Rebind { nonce, .. }), (_, RoamingStep::Challenge { .. })] = steps[..] else {
        panic!("{steps:?}")
    };
    // What was on its way before proves nothing.
    facts.heard += 1;
    assert_eq!(roaming.step(ms(5010), &facts, 0), None);
    assert!(roaming.in_doubt());
    facts.heard += 1;
    facts.answered = nonce;
    assert_eq!(roaming.step(ms(5061), &facts, 0), Some(RoamingStep::Withdraw));
    assert!(!roaming.in_doubt());
    assert_eq!(roaming.step(ms(5061), &facts, 0), None);
    assert_eq!(roaming.due(&facts), Some(ms(5061 + 1000)));
}

/// Spec ROAM-3.
#[test]
fn an_answer_that_does_not_come_puts_the_path_in_doubt() {
    let (mut roaming, mut facts) = connected();
    facts.expecting = true;
    let steps = silent(&mut roaming, &facts, Duration::ZERO, ms(4000));
    let first: Vec<_> = steps.iter().take(3).collect();
    assert!(
        matches!(
            first[..],
            [
                (500, RoamingStep::Ask(1)),
                (900, RoamingStep::Rebind { nonce: 2, amply: false }),
                (1150, RoamingStep::Challenge { hopeful: false })
            ]
        ),
        "{steps:?}"
    );
    assert!(steps.iter().filter(|(_, step)| matches!(step, RoamingStep::Rebind { .. })).count() >= 3, "{steps:?}");
    // Since the first doubt, whatever is said of the network meanwhile.
    roaming.network_changed(ms(4000));
    assert_eq!(roaming.doubted_for(ms(4900)), Some(ms(4000)));
}

#[test]
fn attempts_that_come_to_nothing_are_made_again_and_those_without_a_reason_are_not_hopeful() {
    let mut roaming = Roaming::new(foreground(), Duration::ZERO);
    let facts = PathFacts { rtt: RTT, ..PathFacts::default() };
    let steps = silent(&mut roaming, &facts, Duration::ZERO, ms(60_000));
    let hopeful: Vec<bool> = steps
        .iter()
        .filter_map(|(_, step)| if let RoamingStep::Challenge { hopeful } = step { Some(*hopeful) } else { None })
        .collect();
    assert!((15..30).contains(&hopeful.len()), "{steps:?}");
    assert!(hopeful[0] && !hopeful[1..].contains(&true), "{hopeful:?}");
    // The network is back: the attempt that is under way began before it.
    roaming.network_changed(ms(61_000));
    let steps = silent(&mut roaming, &facts, ms(61_000), ms(61_000));
    assert!(
        matches!(steps[..], [(_, RoamingStep::Challenge { hopeful: true })])
            || matches!(steps[..], [(_, RoamingStep::Withdraw), (_, RoamingStep::Challenge { hopeful: true })]),
        "{steps:?}"
    );
}

#[test]
fn a_server_that_goes_away_is_left_for_the_next_one_in_time() {
    let (mut roaming, facts) = connected();
    roaming.going_away(ms(100), ms(400), 0);
    assert_eq!(roaming.step(ms(100), &facts, 0), None);
    assert_eq!(roaming.step(ms(500), &facts, 0), Some(RoamingStep::Challenge { hopeful: true }));
    roaming.failed(ms(510), u32::MAX);
    assert_eq!(roaming.step(ms(560), &facts, 0), Some(RoamingStep::Challenge { hopeful: false }));
    roaming.ready();
    assert_eq!(roaming.step(ms(600), &facts, 0), Some(RoamingStep::Move));
}

/// Servers that send everybody on at once were asked in a loop.
#[test]
fn servers_that_send_a_client_on_again_and_again_are_left_ever_later() {
    let (mut roaming, facts) = connected();
    let mut now = ms(100);
    let mut pauses = Vec::new();
    for _ in 0..6 {
        let begun = now;
        roaming.going_away(now, Duration::ZERO, u32::MAX);
        // Meanwhile the connection is asked whether it lives.
        while !matches!(roaming.step(now, &facts, 0), Some(RoamingStep::Challenge { .. })) {
            now = roaming.due(&facts).expect("an attempt").max(now);
        }
        pauses.push((now - begun).as_millis());
        roaming.ready();
        assert_eq!(roaming.step(now, &facts, 0), Some(RoamingStep::Move));
    }
    assert_eq!(pauses, [0, 50, 100, 200, 400, 800]);
}

#[test]
fn a_server_that_closes_what_it_said_goodbye_to_is_not_stormed() {
    let (mut roaming, facts) = connected();
    roaming.going_away(ms(100), ms(400), 0);
    roaming.lost(ms(150), true, 0);
    assert_eq!(roaming.step(ms(150), &facts, 0), None);
    assert_eq!(roaming.due(&facts), Some(ms(500)));
    assert_eq!(roaming.step(ms(500), &facts, 0), Some(RoamingStep::Challenge { hopeful: true }));
}

/// What happens to the client of a random world.
#[derive(Debug, Clone)]
enum Happening {
    /// The path dies, or is back.
    Path(bool),
    /// The system says that the network changed.
    NetworkChanged,
    /// The connection ends, with or without a word of the server.
    Lost(bool),
    /// The server says that it goes away.
    GoingAway(u16),
    /// Somebody looks again, or not any more.
    Looked(bool),
    /// Whether anybody waits for an answer, uploads, uses the connection.
    Facts(bool, bool, bool),
}

fn happening() -> impl Strategy<Value = (u16, Happening)> {
    let what = prop_oneof![
        3 => any::<bool>().prop_map(Happening::Path),
        2 => Just(Happening::NetworkChanged),
        1 => any::<bool>().prop_map(Happening::Lost),
        1 => (0u16..2000).prop_map(Happening::GoingAway),
        1 => any::<bool>().prop_map(Happening::Looked),
        2 => any::<(bool, bool, bool)>().prop_map(|(a, b, c)| Happening::Facts(a, b, c)),
    ];
    (0u16..8000, what)
}

/// A world: the truth that the machine does not know.
struct World {
    roaming: Roaming,
    facts: PathFacts,
    now: Duration,
    works: bool,
    connected: bool,
    /// When what was begun answers, if the path works then.
    challenger: Option<Duration>,
    ready: bool,
    answers: Vec<(Duration, u64)>,
    steps: Vec<(Duration, RoamingStep)>,
}

impl World {
    fn act(&mut self) {
        loop {
            let Some(step) = self.roaming.step(self.now, &self.facts, 1 << 31) else { return };
            self.steps.push((self.now, step));
            match step {
                RoamingStep::Ask(nonce) | RoamingStep::Rebind { nonce, .. } => {
                    assert!(self.connected, "{step:?} without a connection");
                    if self.works {
                        self.answers.push((self.now + RTT, nonce));
                    }
                }
                RoamingStep::Challenge { .. } => {
                    assert!(self.challenger.is_none() && !self.ready, "two attempts at once");
                    self.challenger = Some(self.now + RTT);
                }
                RoamingStep::Withdraw => {
                    assert!(self.challenger.is_some() || self.ready, "nothing to withdraw");
                    (self.challenger, self.ready) = (None, false);
                }
                RoamingStep::Move => {
                    assert!(self.ready, "moved to what is not ready");
                    (self.challenger, self.ready, self.connected) = (None, false, true);
                    self.answers.clear();
                    self.facts.heard += 1;
                }
            }
        }
    }

    /// Lets time pass until `until`.
    fn pass(&mut self, until: Duration) {
        loop {
            self.act();
            let answer = self.answers.iter().map(|(at, _)| *at).min();
            let due = self.roaming.due(&self.facts);
            let next = [answer, due, self.challenger].into_iter().flatten().min();
            let Some(next) = next.filter(|next| *next <= until) else { break };
            assert!(next >= self.now, "time runs backwards");
            // Each turn something must happen, or time pass.
            if next == self.now {
                self.now += Duration::from_micros(1);
            }
            self.now = self.now.max(next);
            if self.answers.iter().any(|(at, _)| *at <= self.now) {
                for (_, nonce) in self.answers.extract_if(.., |(at, _)| *at <= self.now) {
                    if self.works {
                        self.facts.heard += 1;
                        self.facts.answered = nonce;
                    }
                }
            }
            if self.challenger.is_some_and(|at| at <= self.now) {
                self.challenger = None;
                if self.works {
                    self.ready = true;
                    self.roaming.ready();
                } else {
                    self.challenger = Some(Duration::MAX);
                }
            }
        }
        self.now = self.now.max(until);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever happens: one attempt at a time, no move to what has not answered, no loop; and once the path works for good, a client that
    /// wants its connection has one soon.
    #[test]
    fn random_worlds(happenings in prop::collection::vec(happening(), 0..40)) {
        let facts = PathFacts { rtt: RTT, ..PathFacts::default() };
        let mut world = World {
            roaming: Roaming::new(foreground(), Duration::ZERO),
            facts,
            now: Duration::ZERO,
            works: true,
            connected: false,
            challenger: None,
            ready: false,
            answers: Vec::new(),
            steps: Vec::new(),
        };
        for (pause, what) in happenings {
            let until = world.now + ms(u64::from(pause));
            world.pass(until);
            match what {
                Happening::Path(works) => world.works = works,
                Happening::NetworkChanged => world.roaming.network_changed(world.now),
                Happening::Lost(hopeful) if world.connected => {
                    world.connected = false;
                    world.answers.clear();
                    world.roaming.lost(world.now, hopeful, 1 << 30);
                }
                Happening::Lost(_) => {}
                Happening::GoingAway(pause) if world.connected => {
                    world.roaming.going_away(world.now, ms(u64::from(pause)), 1 << 31);
                }
                Happening::GoingAway(_) => {}
                Happening::Looked(true) => {
                    world.roaming.set_manners(foreground());
                    world.roaming.woken(world.now);
                }
                Happening::Looked(false) => world.roaming.set_manners(Manners::background(None)),
                Happening::Facts(expecting, uploading, used) => {
                    (world.facts.expecting, world.facts.uploading, world.facts.used) = (expecting, uploading, used);
                }
            }
        }
        let busy = world.steps.len() as u128;
        prop_assert!(busy <= 40 * 4 + world.now.as_millis() / 100, "{busy} steps in {:?}", world.now);
        // From now on it works, and somebody waits.
        (world.works, world.facts.expecting) = (true, true);
        // An attempt that was lost on the way is given up after two seconds.
        let until = world.now + Duration::from_secs(5);
        world.pass(until);
        prop_assert!(world.connected && !world.roaming.in_doubt(), "{:?}", world.steps);
    }
}
