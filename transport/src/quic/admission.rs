//! Which handshakes a listener lets in: as many as it can do at once, not all of them of one network, and under a flood only of peers that
//! proved to be where they say (spec LIM-5).

use core::time::Duration;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::rate::{Limiter, LimiterEach, Rate};

/// What a listener lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// Handshakes that may be under way at once; more are refused.
    pub handshakes: usize,
    /// Of these, those of peers in one network (IPv4 /24, IPv6 /56): one network does not keep out the others.
    pub per_network: usize,
    /// From so many on a peer must show by a second packet that it gets what is sent to its address (Retry): then addresses cannot be made up.
    pub retry_from: usize,
    /// Handshakes that may be begun in a second, and at once behind a rest: each costs a signature whatever comes of it. Who comes too early is not
    /// answered: QUIC asks again by itself, twice as late each time.
    pub rate: Option<Rate>,
    /// Of these, those of peers in one network.
    pub network_rate: Option<Rate>,
    /// How long a handshake may take.
    pub patience: Duration,
    /// Connections whose first datagrams may wait until their handshake is looked at; what comes beyond these is dropped.
    pub waiting: usize,
    /// Bytes of datagrams of one of them that may.
    pub waiting_bytes: u64,
    /// Bytes of all of them together.
    pub waiting_bytes_of_all: u64,
}

impl Default for Admission {
    fn default() -> Self {
        let patience = Duration::from_secs(5);
        Self {
            handshakes: 256,
            per_network: 192,
            retry_from: 64,
            rate: Some(Rate { per_second: 500, burst: 10_000 }),
            network_rate: Some(Rate { per_second: 128, burst: 1024 }),
            patience,
            waiting: 1024,
            waiting_bytes: 64 << 10,
            waiting_bytes_of_all: 16 << 20,
        }
    }
}

/// What becomes of a peer that comes.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It may begin.
    Welcome(Slot),
    /// It has to show that it gets what is sent to its address.
    Retry,
    /// It comes too early, and will come again if nobody answers.
    Early,
    /// Not now.
    Refused,
}

#[derive(Debug, Default)]
struct UnderWay {
    all: usize,
    networks: HashMap<IpAddr, usize>,
}

/// The handshakes that are under way.
#[derive(Debug)]
pub(super) struct Door {
    rules: Admission,
    under_way: Mutex<UnderWay>,
    pace: Option<Limiter>,
    network_pace: Option<LimiterEach<IpAddr>>,
}

impl Door {
    pub(super) fn new(rules: Admission) -> Arc<Self> {
        // No network is called so.
        let others = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let network_pace = LimiterEach::new(rules.network_rate, others);
        Arc::new(Self { rules, under_way: Mutex::default(), pace: Limiter::new(rules.rate), network_pace })
    }

    pub(super) fn patience(&self) -> Duration {
        self.rules.patience
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides about a peer at `address`, which may be made up unless it was `validated`.
    pub(super) fn knock(self: &Arc<Self>, address: IpAddr, validated: bool) -> Verdict {
        let network = network(address);
        let mut under_way = self.lock();
        if !validated && under_way.all >= self.rules.retry_from {
            return Verdict::Retry;
        }
        let of_network = under_way.networks.get(&network).copied().unwrap_or(0);
        if under_way.all >= self.rules.handshakes || of_network >= self.rules.per_network {
            return Verdict::Refused;
        }
        // First its network's, so that what this refuses costs the others nothing.
        if self.network_pace.as_ref().is_some_and(|pace| !pace.take(&network))
            || self.pace.as_ref().is_some_and(|pace| pace.take(1).is_err())
        {
            return Verdict::Early;
        }
        under_way.all += 1;
        under_way.networks.insert(network, of_network + 1);
        drop(under_way);
        Verdict::Welcome(Slot { door: self.clone(), network })
    }
}

/// A handshake that is under way, until this is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    door: Arc<Door>,
    network: IpAddr,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut under_way = self.door.lock();
        under_way.all -= 1;
        if let Some(count) = under_way.networks.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                under_way.networks.remove(&self.network);
            }
        }
    }
}

/// The network of an address: what one customer of a provider mostly has.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => (u32::from(address) & 0xffff_ff00).to_be_bytes().into(),
        IpAddr::V6(address) => (u128::from(address) & !((1 << 72) - 1)).to_be_bytes().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door() -> Arc<Door> {
        let patience = Duration::ZERO;
        let (handshakes, per_network, retry_from, rate, network_rate) = (4, 3, 2, None, None);
        let rules =
            Admission { handshakes, per_network, retry_from, rate, network_rate, patience, ..Admission::default() };
        Door::new(rules)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn one_network_leaves_room_for_others_and_slots_come_back() {
        let door = door();
        let mut slots = Vec::new();
        for at in 0..3 {
            match door.knock(ip(&format!("192.0.2.{at}")), true) {
                Verdict::Welcome(slot) => slots.push(slot),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(door.knock(ip("::ffff:192.0.2.9"), true), Verdict::Refused), "the same network");
        let Verdict::Welcome(other) = door.knock(ip("2001:db8::1"), true) else { panic!("another network") };
        assert!(matches!(door.knock(ip("2001:db8:1::1"), true), Verdict::Refused), "too many");
        drop(other);
        slots.pop();
        assert!(matches!(door.knock(ip("192.0.2.9"), true), Verdict::Welcome(_)));
        drop(slots);
        let left = door.lock();
        assert_eq!((left.all, left.networks.len()), (0, 0));
    }

    #[test]
    fn under_a_flood_a_peer_shows_first_that_it_is_where_it_says() {
        let door = door();
        let _one = door.knock(ip("192.0.2.1"), false);
        let _two = door.knock(ip("198.51.100.1"), false);
        assert!(matches!(door.knock(ip("203.0.113.1"), false), Verdict::Retry));
        assert!(matches!(door.knock(ip("203.0.113.1"), true), Verdict::Welcome(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_are_begun_at_a_rate_behind_a_burst() {
        let rules = Admission { rate: Rate::new(10, 3), network_rate: None, ..Admission::default() };
        let door = Door::new(rules);
        let knock = || matches!(door.knock(ip("192.0.2.1"), true), Verdict::Welcome(_));
        assert_eq!([knock(), knock(), knock(), knock()], [true, true, true, false]);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!([knock(), knock()], [true, false]);
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!([knock(), knock(), knock(), knock()], [true, true, true, false], "no more than a burst gathers");
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_that_begins_too_many_leaves_room_for_others() {
        let rules = Admission { rate: Rate::new(10, 5), network_rate: Rate::new(10, 3), ..Admission::default() };
        let door = Door::new(rules);
        let knock = |from: &str| matches!(door.knock(ip(from), true), Verdict::Welcome(_));
        let one = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"];
        assert_eq!(one.map(knock), [true, true, true, false, false]);
        assert_eq!(["198.51.100.1", "198.51.100.2"].map(knock), [true, true], "who was early cost nothing");
        assert!(!knock("203.0.113.1"), "all of them together have a rate too");
    }

    #[tokio::test(start_paused = true)]
    async fn of_networks_so_many_are_known_and_the_others_count_together() {
        let rules =
            Admission { rate: None, network_rate: Rate::new(1, 2), handshakes: 1 << 20, ..Admission::default() };
        let door = Door::new(rules);
        let knock = |n: u32| {
            matches!(door.knock(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + (n << 8))), true), Verdict::Welcome(_))
        };
        let known = LimiterEach::<IpAddr>::KNOWN as u32;
        assert!((0..known).all(knock));
        assert_eq!([known, known + 1, known + 2].map(knock), [true, true, false]);
        // They are forgotten once they are at rest.
        tokio::time::sleep(Rate::REST).await;
        assert_eq!([known, known, known, known + 1].map(knock), [true, true, false, true]);
    }

    #[test]
    fn networks_are_those_of_one_customer() {
        assert_eq!(network(ip("192.0.2.77")), ip("192.0.2.0"));
        assert_eq!(network(ip("2001:db8:1:2ff:3::4")), ip("2001:db8:1:200::"));
    }
}
