//! Sessions that expire, and what ends with a token.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay_client::{ClientError, Config as ClientConfig, Event, Start};
use mainstay_protocol::Code;
use mainstay_protocol::session::Operation;
use mainstay_server::Config;
use mainstay_store::{MemoryStore, Store};
use mainstay_store_fjall::FjallStore;
use mainstay_tests::harness::{MemoryServer, claims, now};
use mainstay_tests::process::PATIENCE;
use mainstay_tests::until;
use tokio::time::timeout;

async fn unused_sessions_expire(store: Arc<dyn Store>) {
    let mut config = Config::default();
    (config.idle, config.due_pause) = (Duration::from_millis(50), Duration::from_millis(20));
    let server = MemoryServer::start(store.clone(), config);
    let client = server.client();
    let create = async |name: &str, after: Option<Duration>| {
        let mut attaching = client.session(name).expect("a name").create_new();
        if let Some(after) = after {
            attaching = attaching.expire_after(after);
        }
        attaching.attach().await.expect("attach")
    };
    let after = Duration::from_millis(300);
    let kept = create("kept", None).await;
    let held = create("held", Some(after)).await;
    let unused = create("unused", Some(after)).await;
    let producer = unused.producer("p").await.expect("a producer");
    producer.append(unused.main(), "x").await.expect("append").await.expect("stored");
    drop((kept, unused, producer));
    let gone = async |name: &str| {
        until("it expires", async || store.stat(name.parse().expect("a name")).await.expect("stat").is_none()).await;
    };
    gone("unused").await;
    let again = client.session("unused").expect("a name").attach().await;
    assert!(matches!(again, Err(ClientError::Refused { code: Code::SESSION_NOT_FOUND, .. })), "{again:?}");
    // One that is attached does not expire, however long ago it was created: time itself is what passes here.
    tokio::time::sleep(2 * after).await;
    let producer = held.producer("p").await.expect("a producer");
    producer.append(held.main(), "still here").await.expect("append").await.expect("stored");
    drop((held, producer));
    let unused = Instant::now();
    gone("held").await;
    assert!(unused.elapsed() >= after, "expired too early");
    assert!(client.session("kept").expect("a name").attach().await.is_ok(), "what never expires stays");
    server.stop().await;
}

#[tokio::test]
async fn a_session_expires_once_nobody_uses_it_in_memory() {
    unused_sessions_expire(Arc::new(MemoryStore::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_expires_once_nobody_uses_it_on_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = FjallStore::open(dir.path(), mainstay_store_fjall::Config::default()).expect("open");
    let store: Arc<dyn Store> = Arc::new(store);
    unused_sessions_expire(store.clone()).await;
    until("the server's tasks end", async || Arc::strong_count(&store) == 1).await;
    drop(store);
    let report =
        mainstay_store_fjall::verify::verify(dir.path(), &mut |_, _| ControlFlow::Continue(())).expect("verify");
    assert_eq!(report.problems, []);
    assert_eq!(report.sessions, 1);
}

#[tokio::test]
async fn an_idle_subscription_ends_with_its_token() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let owner = server.client();
    owner.session("s").expect("a name").create().attach().await.expect("attach");
    let mut short = claims("guest", "s", [Operation::Read]);
    short.expires = now() + 1;
    let guest = server.client_as(&short, ClientConfig::default());
    let session = guest.session("s").expect("a name").attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let error = loop {
        match timeout(PATIENCE, subscription.next()).await.expect("it ends").expect("an event") {
            Ok(Event::Records(_)) => panic!("nothing was appended"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ClientError::Refused { code: Code::TOKEN_EXPIRED, .. }), "{error:?}");
}
