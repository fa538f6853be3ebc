//! The harness of Mainstay's whole-system tests, and the UDP fault proxy.

pub mod appending;
pub mod attack;
pub mod disk;
pub mod harness;
pub mod live;
pub mod namespaces;
pub mod process;
pub mod proxy;
pub mod random;
pub mod raw;
pub mod recording;
pub mod watched;
pub mod world;

/// Waits until something holds that nobody announces, and looks every few milliseconds.
///
/// # Panics
///
/// If it does not hold within [`PATIENCE`](process::PATIENCE).
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let looking = async {
        while !holds().await {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(process::PATIENCE, looking).await.is_ok(), "{what}: not in time");
}

/// `n`, times what `MAINSTAY_SCALE` says: tests that are short in CI are long where somebody has the time.
///
/// # Panics
///
/// If that is not a number.
pub fn scaled(n: u64) -> u64 {
    let scale = std::env::var("MAINSTAY_SCALE").map(|scale| scale.parse::<u64>().expect("MAINSTAY_SCALE is a number"));
    n * scale.unwrap_or(1)
}

/// The value below which so many percent of `sorted` lie, and the largest.
///
/// # Panics
///
/// If there are none.
pub fn percentile(sorted: &[std::time::Duration], percent: usize) -> std::time::Duration {
    let last = sorted.len().checked_sub(1).expect("values");
    sorted[last * percent / 100]
}

/// Says loudly that a test did not run: on standard error, and in the file that `MAINSTAY_SKIPPED` names, because a test
/// runner keeps to itself what a passing test says.
pub fn skipped(what: &str, why: &str) {
    eprintln!("SKIPPED: {what}: {why}");
    if let Some(path) = std::env::var_os("MAINSTAY_SKIPPED") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        let written =
            file.and_then(|mut file| std::io::Write::write_all(&mut file, format!("{what}: {why}\n").as_bytes()));
        written.expect("the list of skipped tests");
    }
}
