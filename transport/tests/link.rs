//! What a simulated link does to datagrams, one fault at a time.

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mainstay_transport::sim::{Conditions, Faults, Link, Random};
use tokio::time::{Instant, timeout};

/// Sends `count` numbered datagrams of `len` bytes at once. Returns which came out, in this order, and when.
async fn pass(conditions: Arc<Conditions>, count: u32, len: usize) -> Vec<(u32, Duration)> {
    let mut link = Link::new(conditions, Random::new(7));
    let begun = Instant::now();
    for n in 0..count {
        let mut datagram = vec![0; len.max(4)];
        datagram[..4].copy_from_slice(&n.to_be_bytes());
        link.take(datagram);
    }
    let mut out = Vec::new();
    while let Ok(datagram) = timeout(Duration::from_secs(60), link.next()).await {
        out.push((u32::from_be_bytes(*datagram.first_chunk().expect("a number")), begun.elapsed()));
    }
    out
}

fn numbers(out: &[(u32, Duration)]) -> Vec<u32> {
    out.iter().map(|(n, _)| *n).collect()
}

#[tokio::test(start_paused = true)]
async fn delay_and_jitter_keep_the_order() {
    let faults = Faults { delay: Duration::from_millis(30), jitter: Duration::from_millis(10), ..Faults::default() };
    let out = pass(Conditions::new(faults), 200, 100).await;
    assert_eq!(numbers(&out), (0..200).collect::<Vec<_>>());
    assert!(out.iter().all(|(_, at)| (30..=42).contains(&at.as_millis())), "{out:?}");
    assert!(out.windows(2).any(|pair| pair[0].1 != pair[1].1), "no jitter");
}

#[tokio::test(start_paused = true)]
async fn loss_is_what_was_asked_for_and_the_same_for_a_seed() {
    let run = || pass(Conditions::new(Faults { loss: 0.2, ..Faults::default() }), 5000, 100);
    let out = run().await;
    assert!((3850..4150).contains(&out.len()), "{} of 5000 passed", out.len());
    assert_eq!(numbers(&out), numbers(&run().await));
}

#[tokio::test(start_paused = true)]
async fn bursts_lose_datagrams_in_a_row() {
    let faults = Faults { burst: 0.01, burst_length: 9, ..Faults::default() };
    let out = numbers(&pass(Conditions::new(faults), 2000, 100).await);
    let gaps: Vec<u32> = out.windows(2).map(|pair| pair[1] - pair[0] - 1).filter(|gap| *gap > 0).collect();
    assert!(gaps.len() > 5, "{gaps:?}");
    // The one that begins a burst and the nine behind it; bursts may follow each other.
    assert!(gaps.iter().all(|gap| gap % 10 == 0), "{gaps:?}");
}

#[tokio::test(start_paused = true)]
async fn reordered_and_duplicated_datagrams_come_all() {
    let faults = Faults { reorder: 0.1, duplicate: 0.1, ..Faults::default() };
    let conditions = Conditions::new(faults);
    let out = numbers(&pass(conditions.clone(), 1000, 100).await);
    let twice = conditions.counts().duplicated.load(Ordering::Relaxed) as usize;
    assert!(twice > 50 && out.len() == 1000 + twice, "{twice} twice, {} out", out.len());
    assert!(out.windows(2).any(|pair| pair[0] > pair[1]), "in order");
    let mut once = out;
    once.sort_unstable();
    once.dedup();
    assert_eq!(once, (0..1000).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_rate_spreads_datagrams_and_its_queue_loses_the_rest() {
    // 100 bytes each 10 ms; 5000 bytes may wait.
    let faults = Faults { rate: 10_000, queue: 5000, ..Faults::default() };
    let out = pass(Conditions::new(faults), 200, 100).await;
    assert!((50..=52).contains(&out.len()), "{} passed", out.len());
    assert_eq!(numbers(&out), (0..out.len() as u32).collect::<Vec<_>>());
    for (n, at) in &out {
        let due = 10 * (u128::from(*n) + 1);
        assert!((due..due + 3).contains(&at.as_millis()), "{n} after {at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_mtu_and_a_blackhole_lose_what_they_should() {
    let conditions = Conditions::new(Faults { mtu: 1200, ..Faults::default() });
    assert_eq!(pass(conditions.clone(), 10, 1200).await.len(), 10);
    assert_eq!(pass(conditions.clone(), 10, 1201).await.len(), 0);
    conditions.blackhole(true);
    assert_eq!(pass(conditions.clone(), 10, 100).await.len(), 0);
    conditions.blackhole(false);
    assert_eq!(pass(conditions.clone(), 10, 100).await.len(), 10);
    conditions.set_faults(Faults { loss: 1.0, ..Faults::default() });
    assert_eq!(pass(conditions, 10, 100).await.len(), 0);
}
