//! How a client keeps its way to the server: when it asks for a sign of life, when it changes the path, when it tries another connection
//! beside the one it has, and which of the two goes on (spec ROAM).
//!
//! ```text
//!            quiet, or an answer is due          no answer, or the network changed
//!   sound ───────────────────────────▶ asking ──────────────────────────────────▶ in doubt: rebind, ask, challenge
//!     ▲                                   │ heard                                      │ heard        │ the challenger is ready
//!     └───────────────────────────────────┴────────────────────────────────────────────┘ withdraw     ▼ first: move
//! ```

use core::cmp::Ordering;
use core::net::SocketAddr;
use core::time::Duration;

use super::Backoff;

/// How eager a client is to know that its path works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manners {
    /// After how long at most without a word a sign of life is asked for while the connection is used; `None` for never: what holds NAT
    /// bindings open costs a radio its sleep.
    pub keep_alive: Option<Duration>,
    /// The same once a dozen questions in a row, which takes about a minute, brought nothing but answers.
    pub resting: Duration,
    /// After how long a path that was just busy and fell silent is asked first, at most.
    pub busy: Duration,
    /// The same at least, where what came followed each other closely: a NAT that forgot is noticed before people do.
    pub brisk: Duration,
}

impl Manners {
    /// Somebody looks at it: a path that dies is noticed within seconds.
    pub fn foreground(keep_alive: Duration) -> Self {
        let resting = (keep_alive * 5 / 2).min(BINDING.max(keep_alive));
        Self { keep_alive: Some(keep_alive), resting, busy: BUSY.min(keep_alive), brisk: BRISK.min(keep_alive) }
    }

    /// Nobody looks at it.
    pub fn background(keep_alive: Option<Duration>) -> Self {
        let busy = keep_alive.unwrap_or(BUSY);
        Self { keep_alive, resting: busy, busy, brisk: busy }
    }
}

/// Questions in a row that brought nothing but an answer, after which they may be further apart: less than half of what an idle connection costs
/// its server and a radio, for seconds that nobody misses who has seen nothing happen for so long.
const RESTED: u32 = 12;
/// Most NATs keep a binding for 30 s; a question is lost now and then.
const BINDING: Duration = Duration::from_secs(25);

/// See [`Manners::busy`].
const BUSY: Duration = Duration::from_secs(1);
/// See [`Manners::brisk`].
const BRISK: Duration = Duration::from_millis(250);
/// What follows each other more closely is taken to do so at this pace.
const CLOSEST: Duration = Duration::from_millis(1);
/// A path is silent when so many times as long as usual nothing came.
const UNUSUAL: u32 = 8;
/// How often is asked while an answer is due.
const EXPECTING: Duration = Duration::from_millis(500);
/// How long an answer may take at least, beyond three round trips.
const SLACK: Duration = Duration::from_millis(50);
/// The least patience with a path: a pause of the scheduler or of a radio is no loss.
const PATIENCE: Duration = Duration::from_millis(400);
/// A second connection is tried after this long at least, so that a path that changed without harm costs no handshake.
const GRACE: Duration = Duration::from_millis(250);
/// A path that was silent for longer gets a second connection at once: QUIC's timers have backed off on it.
const OUTAGE: Duration = Duration::from_secs(2);
/// How long an attempt to connect is believed in at first, and at most. Its own timers back off, so that a fresh one is sooner after an outage;
/// where the round trip is long, later ones have the time.
const ATTEMPTS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));
/// A connection that lived for so long was not just sent on.
const SETTLED: Duration = Duration::from_millis(500);
/// Pauses between attempts, and between rebinds.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// What is known when the machine is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathFacts {
    /// Changes whenever anything came from the server over the connection.
    pub heard: u64,
    /// Changes whenever something came that was not asked for by [`RoamingStep::Ask`].
    pub news: u64,
    /// The nonce that the server answered last.
    pub answered: u64,
    /// The round-trip time.
    pub rtt: Duration,
    /// Somebody waits for an answer.
    pub expecting: bool,
    /// Batches are on the way: the bytes of an upload wait for timers that have backed off.
    pub uploading: bool,
    /// The connection is used: something may come over it at any time.
    pub used: bool,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoamingStep {
    /// Send PING with this nonce.
    Ask(u64),
    /// Go on over a new socket, and send PING.
    Rebind {
        /// Its nonce.
        nonce: u64,
        /// Nothing was lost before: it should say enough for the answers, which a server that has not validated the path may not exceed. After an
        /// outage that would stand in its own way: it is resent, and QUIC sends little at first.
        amply: bool,
    },
    /// Begin a second connection. Where there is reason to hope that it comes through, with what can be used once.
    Challenge {
        /// Something says that the server can be reached now.
        hopeful: bool,
    },
    /// Give the second connection up: the first goes on, or another attempt is due.
    Withdraw,
    /// The second connection is the one from now on; the first is closed.
    Move,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Challenger {
    None,
    /// It is being made, since then.
    Trying(Duration),
    /// It was begun on a network that is gone.
    Stale,
    /// The server has answered on it.
    Ready,
}

#[derive(Debug, Clone, Copy)]
struct Doubt {
    /// Since when, over all changes of the path; since the newest of them; and when it was changed last.
    first: Duration,
    since: Duration,
    rebound: Duration,
    /// The nonce that proves the path, asked over it.
    nonce: u64,
    again: Duration,
    /// The network changed, so that there is hope; else nothing but silence speaks.
    hopeful: bool,
    /// The path was not in doubt before.
    fresh: bool,
}

/// The nonce of a path that was not asked yet.
const UNASKED: u64 = u64::MAX;

impl Doubt {
    fn new(now: Duration, hopeful: bool) -> Self {
        Self { first: now, since: now, rebound: now, nonce: UNASKED, again: now, hopeful, fresh: true }
    }
}

/// Decides what a client does about its path, from what is known of it. Times are durations since any fixed moment and never run backwards.
#[derive(Debug)]
pub struct Roaming {
    manners: Manners,
    /// There is a connection.
    connected: bool,
    /// The server moves: another connection is wanted although this one works.
    leaving: bool,
    /// When it was looked last.
    looked: Duration,
    heard: (u64, Duration),
    answered: u64,
    news: (u64, Duration),
    /// How closely what came followed each other when it was looked at last.
    pace: Duration,
    /// Questions in a row that brought an answer and nothing else.
    quiet: u32,
    /// How much of the longer pause the first rest has, of 2³²: clients that came together do not ask together for ever.
    first_rest: u32,
    /// Since when a question is open.
    asked: Option<Duration>,
    nonce: u64,
    doubt: Option<Doubt>,
    challenger: Challenger,
    /// When the next attempt is due, and whether there is hope.
    challenge: Option<(Duration, bool)>,
    attempts: Backoff,
    rebinds: Backoff,
    /// When a server that went away was left for another one, and the pauses where that comes again and again.
    sent_on: Option<Duration>,
    leavings: Backoff,
}

impl Roaming {
    /// Of a client without a connection: an attempt is due at once.
    pub fn new(manners: Manners, now: Duration) -> Self {
        Self {
            manners,
            connected: false,
            leaving: false,
            looked: now,
            heard: (0, now),
            answered: 0,
            news: (0, now),
            pace: BUSY,
            quiet: 0,
            first_rest: 0,
            asked: None,
            nonce: 0,
            doubt: None,
            challenger: Challenger::None,
            challenge: Some((now, true)),
            attempts: Backoff::new(PAUSES.0, PAUSES.1),
            rebinds: Backoff::new(EXPECTING, PAUSES.1),
            sent_on: None,
            leavings: Backoff::new(PAUSES.0, PAUSES.1),
        }
    }

    /// Behaves otherwise from now on.
    pub fn set_manners(&mut self, manners: Manners) {
        self.manners = manners;
    }

    /// The system, or the application, says that the network is another one, or back.
    pub fn network_changed(&mut self, now: Duration) {
        self.attempts.reset();
        if self.connected {
            // Asked anew, over a new socket, whatever was asked before.
            self.rebinds.reset();
            let first = self.doubt.map_or(now, |doubt| doubt.first);
            self.doubt = Some(Doubt { first, fresh: self.doubt.is_none(), ..Doubt::new(now, true) });
            self.challenge = None;
        } else {
            self.challenge = Some((now, true));
        }
        if matches!(self.challenger, Challenger::Trying(_)) {
            self.challenger = Challenger::Stale;
        }
    }

    /// The application is looked at again, after what may have been a long sleep.
    pub fn woken(&mut self, now: Duration) {
        if !self.connected || now.saturating_sub(self.heard.1) >= OUTAGE {
            self.network_changed(now);
        }
    }

    /// The server says that it moves, or stops: another connection is tried after `pause`, and taken when it is ready.
    ///
    /// Of servers that send their clients on at once, one after the other, each is left later than the one before.
    pub fn going_away(&mut self, now: Duration, pause: Duration, random: u32) {
        self.leaving = true;
        let settled = self.sent_on.is_none_or(|at| now.saturating_sub(at) >= SETTLED);
        let pause = match settled {
            true => {
                self.leavings.reset();
                pause
            }
            false => pause.max(self.leavings.next(random)),
        };
        if self.challenger == Challenger::None {
            self.challenge = Some((now + pause, true));
        }
    }

    /// The connection is lost. There is hope if the server, or another process in its place, said so.
    pub fn lost(&mut self, now: Duration, hopeful: bool, random: u32) {
        self.connected = false;
        let leaving = core::mem::take(&mut self.leaving);
        if leaving {
            self.sent_on = Some(now);
        }
        (self.doubt, self.asked) = (None, None);
        if self.challenger != Challenger::None {
            return;
        }
        let pause = if hopeful { Duration::ZERO } else { self.attempts.next(random) };
        let due = match self.challenge {
            // The server asked its clients not to come back all at once.
            Some((due, _)) if leaving => due,
            Some((due, _)) => due.min(now + pause),
            None => now + pause,
        };
        self.challenge = Some((due, hopeful));
    }

    /// The server has answered on the second connection.
    pub fn ready(&mut self) {
        self.challenger = Challenger::Ready;
    }

    /// The second connection came to nothing.
    pub fn failed(&mut self, now: Duration, random: u32) {
        self.challenger = Challenger::None;
        if !self.connected || self.doubt.is_some() || self.leaving {
            self.challenge = Some((now + self.attempts.next(random), false));
        }
    }

    /// True while nobody knows whether the path works.
    pub fn in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    /// True from when the server said that it goes away until another connection has taken its place.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// For how long it is not known whether the path works, over all changes of it.
    pub fn doubted_for(&self, now: Duration) -> Option<Duration> {
        self.doubt.map(|doubt| now.saturating_sub(doubt.first))
    }

    /// True for a while after the path was changed: something may come over it that nobody announces.
    pub fn listens(&self, now: Duration, rtt: Duration) -> bool {
        self.doubt.is_some_and(|doubt| now.saturating_sub(doubt.rebound) <= Self::patience(rtt))
    }

    /// How long the attempt under way is believed in.
    fn believed(&self) -> Duration {
        ATTEMPTS.0.saturating_mul(self.attempts.failures().saturating_add(1)).min(ATTEMPTS.1)
    }

    /// How long a question may stay open.
    fn patience(rtt: Duration) -> Duration {
        (3 * rtt + SLACK).max(PATIENCE)
    }

    /// After how long without a word it is asked, if ever.
    fn ask_after(&self, facts: &PathFacts) -> Option<Duration> {
        if facts.expecting || facts.uploading {
            return Some(EXPECTING);
        }
        let keep_alive = self.manners.keep_alive.filter(|_| facts.used)?;
        let longest = match self.quiet.cmp(&RESTED) {
            Ordering::Less => keep_alive,
            Ordering::Equal => {
                keep_alive + self.manners.resting.saturating_sub(keep_alive) / 1024 * (self.first_rest >> 22)
            }
            Ordering::Greater => self.manners.resting,
        };
        let usual = self.pace.saturating_mul(UNUSUAL).max(self.manners.brisk).min(self.manners.busy);
        Some(usual.saturating_mul(1 << self.quiet.min(10)).min(longest))
    }

    /// What to do at `now`, if anything. To be asked again until there is nothing, and then at [`Roaming::due`].
    pub fn step(&mut self, now: Duration, facts: &PathFacts, random: u32) -> Option<RoamingStep> {
        if self.connected
            && let Some(step) = self.watch(now, facts, random)
        {
            return Some(step);
        }
        match self.challenger {
            Challenger::Ready if self.may_move(now, facts) => {
                self.moved(now, facts);
                Some(RoamingStep::Move)
            }
            Challenger::Stale => {
                self.challenger = Challenger::None;
                Some(RoamingStep::Withdraw)
            }
            Challenger::Trying(since) if now.saturating_sub(since) >= self.believed() => {
                self.failed(now, random);
                Some(RoamingStep::Withdraw)
            }
            Challenger::None => {
                let (_, hopeful) = self.challenge.filter(|(due, _)| *due <= now)?;
                self.challenge = None;
                self.challenger = Challenger::Trying(now);
                Some(RoamingStep::Challenge { hopeful })
            }
            _ => None,
        }
    }

    /// Looks after the connection that there is.
    fn watch(&mut self, now: Duration, facts: &PathFacts, random: u32) -> Option<RoamingStep> {
        let looked = core::mem::replace(&mut self.looked, now);
        let answered = core::mem::replace(&mut self.answered, facts.answered) != facts.answered;
        let heard = facts.heard != self.heard.0;
        if heard {
            // What nobody was told of when it came, such as a late acknowledgement, came at any time since the last look.
            let told = answered || facts.news != self.news.0 || facts.expecting || facts.uploading;
            self.heard = (facts.heard, if told { now } else { looked });
        }
        if facts.news != self.news.0 {
            let count = u32::try_from(facts.news.wrapping_sub(self.news.0)).unwrap_or(u32::MAX);
            // The look into which a silence fell says little: slower is believed step by step.
            let pace = now.saturating_sub(self.news.1) / count.max(1);
            self.pace = pace.min(2 * self.pace).max(CLOSEST);
            self.news = (facts.news, now);
            self.quiet = 0;
        }
        if let Some(doubt) = &mut self.doubt {
            // What was on its way before the path changed proves nothing of the new one.
            let in_time = doubt.nonce != UNASKED && now.saturating_sub(doubt.rebound) * 4 >= facts.rtt * 3;
            if doubt.nonce == facts.answered || heard && in_time {
                (self.doubt, self.asked) = (None, None);
                self.rebinds.reset();
                self.attempts.reset();
                if !self.leaving {
                    self.challenge = None;
                    if self.challenger != Challenger::None {
                        self.challenger = Challenger::None;
                        return Some(RoamingStep::Withdraw);
                    }
                }
                return None;
            }
            if now < doubt.again {
                return None;
            }
            self.nonce += 1;
            let first = doubt.nonce == UNASKED;
            (doubt.nonce, doubt.rebound) = (self.nonce, now);
            doubt.again = now + self.rebinds.next(random).max(Self::patience(facts.rtt));
            let mut amply = false;
            if first {
                let silent = now.saturating_sub(self.heard.1) >= OUTAGE;
                let pause = if silent || facts.uploading { Duration::ZERO } else { GRACE.max(2 * facts.rtt) };
                self.challenge = Some((now + pause, doubt.hopeful));
                amply = doubt.hopeful && doubt.fresh && !silent;
            }
            return Some(RoamingStep::Rebind { nonce: self.nonce, amply });
        }
        if heard {
            if self.asked.take().is_some() && self.news.1 != now {
                self.quiet = self.quiet.saturating_add(1);
                self.first_rest = random;
            }
            return None;
        }
        match self.asked {
            Some(asked) if now.saturating_sub(asked) >= Self::patience(facts.rtt) => {
                self.doubt = Some(Doubt::new(now, false));
                self.watch(now, facts, random)
            }
            Some(_) => None,
            None => {
                let after = self.ask_after(facts)?;
                if now.saturating_sub(self.heard.1) < after {
                    return None;
                }
                self.asked = Some(now);
                self.nonce += 1;
                Some(RoamingStep::Ask(self.nonce))
            }
        }
    }

    fn may_move(&self, now: Duration, facts: &PathFacts) -> bool {
        match &self.doubt {
            _ if !self.connected || self.leaving => true,
            Some(doubt) => facts.uploading || now.saturating_sub(doubt.since) >= 3 * facts.rtt,
            None => false,
        }
    }

    fn moved(&mut self, now: Duration, facts: &PathFacts) {
        self.connected = true;
        if core::mem::take(&mut self.leaving) {
            self.sent_on = Some(now);
        }
        self.challenger = Challenger::None;
        (self.doubt, self.asked, self.challenge) = (None, None, None);
        self.attempts.reset();
        self.rebinds.reset();
        (self.quiet, self.pace) = (0, BUSY);
        // Another connection counts anew.
        (self.heard, self.news) = ((u64::MAX, now), (facts.news, now));
        (self.looked, self.answered) = (now, facts.answered);
    }

    /// When there may be something to do, if nothing happens before.
    pub fn due(&self, facts: &PathFacts) -> Option<Duration> {
        let challenge = match self.challenger {
            Challenger::None => self.challenge.map(|(due, _)| due),
            Challenger::Stale => Some(Duration::ZERO),
            Challenger::Trying(since) => Some(since + self.believed()),
            Challenger::Ready => self.doubt.as_ref().map(|doubt| doubt.since + 3 * facts.rtt),
        };
        let watch = self.connected.then(|| match (&self.doubt, self.asked) {
            (Some(doubt), _) => Some(doubt.again),
            (None, Some(asked)) => Some(asked + Self::patience(facts.rtt)),
            (None, None) => Some(self.heard.1 + self.ask_after(facts)?),
        });
        challenge.into_iter().chain(watch.flatten()).min()
    }
}
/// What begins the reason of a connection that is closed because the server moves: behind it stands where it moves to (spec CONN-10).
const MOVED: &str = "moved to ";

/// The reason with which a server that moves closes a connection: who had not read its GOAWAY yet would not know where it went.
pub fn moved_reason(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "the server stops".to_owned(), |address| format!("{MOVED}{address}"))
}

/// Where the server moved to that closed a connection with this reason, if it says so.
pub fn moved_to(reason: &str) -> Option<SocketAddr> {
    reason.strip_prefix(MOVED)?.parse().ok()
}

/// Where a client goes that reaches the server at `server` and is sent on to `told` (spec CONN-10). An unspecified address is the one by which the
/// server is reached, with another port. `None` for the address of a machine of its own, where that is not where the server is: it would find
/// itself.
pub fn sent_on_to(server: Option<SocketAddr>, told: SocketAddr) -> Option<SocketAddr> {
    let ip = match (told.ip().to_canonical(), server.map(|server| server.ip().to_canonical())) {
        (ip, Some(server)) if ip.is_unspecified() => server,
        (ip, None) if ip.is_unspecified() => return None,
        (ip, Some(server)) if ip.is_loopback() && !server.is_loopback() => return None,
        (ip, _) => ip,
    };
    Some(SocketAddr::new(ip, told.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader behind a NAT that forgot hears nothing until it sends something: it asks soon where it heard much, whatever moment the silence began in.
    #[test]
    fn a_path_that_was_busy_and_falls_silent_is_asked_soon() {
        for (beat, silent_at, late) in
            [(20, 7003, 600), (20, 7130, 600), (20, 7248, 600), (100, 7003, 1700), (1000, 7003, 2100)]
        {
            let ms = Duration::from_millis;
            let mut roaming = Roaming::new(Manners::foreground(ms(5000)), ms(0));
            let mut facts = PathFacts { used: true, rtt: ms(20), ..PathFacts::default() };
            roaming.step(ms(0), &facts, 0);
            roaming.ready();
            assert_eq!(roaming.step(ms(0), &facts, 0), Some(RoamingStep::Move));
            let mut now = ms(0);
            let asked = loop {
                let came = now.min(ms(silent_at)).as_millis() as u64 / beat;
                (facts.heard, facts.news) = (came, came);
                match roaming.step(now, &facts, 0) {
                    Some(RoamingStep::Ask(_)) if now > ms(silent_at) => break now,
                    // Between two that come slowly, too: that is answered.
                    Some(RoamingStep::Ask(nonce)) => facts.answered = nonce,
                    Some(step) => panic!("{step:?} at {now:?}"),
                    None => now = roaming.due(&facts).expect("something to do").max(now + ms(1)),
                }
            };
            assert!(asked <= ms(silent_at + late), "{beat} ms, silent at {silent_at}: asked at {asked:?}");
        }
    }

    #[test]
    fn the_reason_of_a_server_that_moves_says_where() {
        let address = "[2001:db8::1]:4434".parse().expect("an address");
        assert_eq!(moved_to(&moved_reason(Some(address))), Some(address));
        assert_eq!(moved_to(&moved_reason(None)), None);
        for reason in ["", "moved to", "moved to ", "moved to somewhere", "the server stops"] {
            assert_eq!(moved_to(reason), None, "{reason}");
        }
    }

    #[test]
    fn a_client_is_sent_on_to_the_machine_that_it_reaches() {
        let at = |text: &str| Some(text.parse::<SocketAddr>().expect("an address"));
        let on = |server: &str, told: &str| sent_on_to(at(server), told.parse().expect("an address"));
        assert_eq!(on("192.0.2.1:4433", "192.0.2.9:4434"), at("192.0.2.9:4434"));
        assert_eq!(on("192.0.2.1:4433", "0.0.0.0:4434"), at("192.0.2.1:4434"));
        assert_eq!(on("[2001:db8::1]:4433", "[::]:4434"), at("[2001:db8::1]:4434"));
        assert_eq!(on("192.0.2.1:4433", "127.0.0.1:4434"), None);
        assert_eq!(on("127.0.0.1:4433", "127.0.0.1:4434"), at("127.0.0.1:4434"));
        assert_eq!(on("192.0.2.1:4433", "[::ffff:127.0.0.1]:4434"), None);
    }
}
