//! `notify`: rules of notification, and the worker that delivers.

use core::time::Duration;
use std::collections::HashMap;
use std::sync::Arc;

use mainstay_client::{
    Client, Config, Job, JobEvent, JobKey, JobOutcome, Jobs, Label, NotifyRule, Subject, Triggers, View,
};
use mainstay_protocol::session::Backoff;
use serde_json::{Value, json};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::args::{self, NotifyAction};
use crate::data::{patiently, with_client};
use crate::failure::{About as _, Failure};
use crate::output::{Output, time};
use crate::serve::signalled;

pub(crate) async fn run(args: args::Notify, output: Output) -> Result<(), Failure> {
    let mut config = Config::default();
    if !matches!(args.action, NotifyAction::Work { .. }) {
        // Somebody waits for one answer, not for a server to come back.
        config.give_up_after = Some(Duration::from_secs(5));
    }
    with_client(args.connect.as_deref(), config, output, async |client| act(client, args.action, output).await).await
}

async fn act(client: &Client, action: NotifyAction, output: Output) -> Result<(), Failure> {
    match action {
        NotifyAction::Rule { session, name, principal, on, delay, collapse } => {
            let triggers = Triggers::new(on.into_iter().map(Into::into)).map_err(mainstay_client::ClientError::from)?;
            let delay = u64::try_from(Duration::from_secs_f64(delay).as_millis()).unwrap_or(u64::MAX);
            set(client, &session, NotifyRule { name, principal, triggers, delay, collapse }, output).await
        }
        NotifyAction::Unrule { session, name } => {
            // Of nothing, and so to nobody: the subject says nothing.
            let principal = Subject::new("-").map_err(mainstay_client::ClientError::from)?;
            let rule = NotifyRule { name, principal, triggers: Triggers::default(), delay: 0, collapse: None };
            let view = view(client, &session).await?;
            if !view.notifications().rules().iter().any(|known| known.name == rule.name) {
                let message = format!("session {session} has no rule {}; `notify show` lists those it has", rule.name);
                return Err(Failure::failed("NOT_FOUND", message));
            }
            set(client, &session, rule, output).await
        }
        NotifyAction::Show { session } => show(&view(client, &session).await?, output),
        NotifyAction::Work { prefix, webhook, authorization, give_up, limit } => {
            let jobs = client.jobs(&prefix, limit.into());
            let webhook = webhook.map(|url| Webhook::new(url, authorization)).transpose()?.map(Arc::new);
            let worker = Worker { jobs, webhook, give_up: Duration::from_secs_f64(give_up), output };
            let begun = async {
                patiently(client, "", output, client.connected()).await?;
                let event = json!({"event": "working", "prefix": prefix, "limit": limit});
                output.event(&event, || format!("waiting for jobs of sessions {prefix}*; Ctrl-C ends"))?;
                core::future::pending().await
            };
            tokio::select! {
                result = worker.run() => result,
                result = begun => result,
                () = signalled() => Ok(()),
            }
        }
    }
}

/// The view of a session as it is now.
async fn view(client: &Client, session: &str) -> Result<View, Failure> {
    let mut live = client.session(session)?.live().await.about(session)?;
    Ok(live.current().await.about(session)?.clone())
}

async fn set(client: &Client, session: &str, rule: NotifyRule, output: Output) -> Result<(), Failure> {
    let (name, gone) = (rule.name.as_str().to_owned(), rule.triggers.kinds().is_empty());
    let event = rule_row(if gone { "unruled" } else { "ruled" }, &rule);
    let attaching = client.session(session)?;
    let seq = if gone { attaching } else { attaching.create() }
        .attach()
        .await
        .about(session)?
        .set_rule(rule)
        .await
        .about(session)?;
    let mut event = event;
    event["session"] = session.into();
    event["seq"] = seq.into();
    output.event(&event, || match gone {
        true => format!("rule {name} of {session} is no more (seq {seq})"),
        false => format!("rule {name} of {session} is in force (seq {seq})"),
    })
}

fn words(triggers: &Triggers) -> Vec<&'static str> {
    triggers.kinds().iter().filter_map(|kind| kind.name()).collect()
}

fn rule_row(event: &str, rule: &NotifyRule) -> Value {
    json!({
        "event": event, "rule": rule.name.as_str(), "principal": rule.principal.as_str(), "on": words(&rule.triggers),
        "delay_ms": rule.delay, "collapse": rule.collapse.as_ref().map(Label::as_str),
    })
}

fn show(view: &View, output: Output) -> Result<(), Failure> {
    let notes = view.notifications();
    if notes.rules().is_empty() && notes.jobs().is_empty() {
        output.text("no rules, no jobs\n")?;
    }
    for rule in notes.rules() {
        output.event(&rule_row("rule", rule), || {
            let (name, principal, on) = (rule.name.as_str(), rule.principal.as_str(), words(&rule.triggers).join(", "));
            format!("rule {name}: tells {principal} of {on} after {} s", rule.delay as f64 / 1000.0)
        })?;
    }
    for job in notes.jobs() {
        let cause = job.cause.name().unwrap_or_default();
        let event = json!({
            "event": "waiting", "rule": job.rule.as_str(), "principal": job.principal.as_str(), "cause": cause,
            "seq": job.id, "due": time(job.due), "for_workers": job.emitted,
        });
        output.event(&event, || {
            let stands = if job.emitted { "waits for a worker".to_owned() } else { format!("due {}", time(job.due)) };
            format!("job {}:{} for {}: {cause}, {stands}", job.id, job.rule.as_str(), job.principal.as_str())
        })?;
    }
    Ok(())
}

/// What is sent, and what is printed.
fn body(job: &Job) -> Value {
    json!({
        "key": job.key.to_string(), "session": job.session.as_str(), "rule": job.key.rule.as_str(),
        "principal": job.principal.as_str(), "cause": job.cause.name(), "seq": job.key.seq, "time": time(job.time),
        "request": job.request.map(|request| request.to_string()),
    })
}

/// What came of one attempt.
enum Attempt {
    Delivered,
    Failed(String),
    /// It can be tried again, not before so long.
    Again(String, Duration),
}

/// Where jobs are sent.
struct Webhook {
    agent: ureq::Agent,
    url: String,
    authorization: Option<String>,
}

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(10);
/// First pause after an attempt that can be made again, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

impl Webhook {
    fn new(url: String, authorization: Option<String>) -> Result<Self, Failure> {
        let usable = url.parse::<ureq::http::Uri>().is_ok_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
        });
        if !usable {
            return Err(Failure::usage("--webhook is not an address that begins with http:// or https://"));
        }
        if authorization.as_ref().is_some_and(|value| ureq::http::HeaderValue::from_str(value).is_err()) {
            return Err(Failure::usage("--authorization cannot be the value of a header"));
        }
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(ATTEMPT))
            // What is meant for one address is not for whoever that names.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("mainstay/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { agent: config.into(), url, authorization })
    }

    /// Blocks for [`ATTEMPT`] at most.
    fn post(&self, key: &str, body: &str) -> Attempt {
        let mut request = self.agent.post(&self.url).content_type("application/json").header("Idempotency-Key", key);
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        match request.send(body) {
            Ok(response) => match response.status().as_u16() {
                200..=299 => Attempt::Delivered,
                // What is wrong with the job will be so again; what is wrong with the webhook may be mended.
                status @ (300..=399 | 400 | 410 | 413 | 422) => {
                    Attempt::Failed(format!("the webhook answered {status}"))
                }
                status => {
                    let after = response.headers().get("retry-after").and_then(|after| after.to_str().ok());
                    let after = after
                        .and_then(|seconds| seconds.trim().parse().ok())
                        .map_or(Duration::ZERO, Duration::from_secs);
                    Attempt::Again(format!("the webhook answered {status}"), after)
                }
            },
            Err(error) => Attempt::Again(format!("the webhook cannot be reached: {error}"), Duration::ZERO),
        }
    }
}

/// What a delivery says while it goes on.
struct Delivery {
    webhook: Arc<Webhook>,
    give_up: Duration,
    output: Output,
}

impl Delivery {
    /// Sends a job until it is known what became of it.
    async fn deliver(&self, job: &Job) -> Result<(JobOutcome, String), Failure> {
        let (key, text) = (job.key.to_string(), body(job).to_string());
        let until = Instant::now() + self.give_up;
        let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            let (webhook, sent, text) = (self.webhook.clone(), key.clone(), text.clone());
            let attempt = tokio::task::spawn_blocking(move || webhook.post(&sent, &text)).await;
            let (why, after) = match attempt {
                Ok(Attempt::Delivered) => return Ok((JobOutcome::Delivered, String::new())),
                Ok(Attempt::Failed(why)) => return Ok((JobOutcome::Failed, why)),
                Ok(Attempt::Again(why, after)) => (why, after),
                Err(error) => (format!("the attempt failed: {error}"), Duration::ZERO),
            };
            let pause = backoff.next(rand::random()).max(after);
            if Instant::now().checked_add(pause).is_none_or(|next| next >= until) {
                return Ok((JobOutcome::Failed, why));
            }
            let wait = pause.as_secs_f64();
            let event =
                json!({"event": "retry", "key": key, "why": why, "wait_s": wait, "attempt": backoff.failures()});
            self.output.event(&event, || format!("job {key}: {why}; again in {wait:.1} s"))?;
            tokio::time::sleep(pause).await;
        }
    }
}

struct Worker {
    jobs: Jobs,
    webhook: Option<Arc<Webhook>>,
    give_up: Duration,
    output: Output,
}

type Delivered = (JobKey, Result<(JobOutcome, String), Failure>);

impl Worker {
    async fn run(mut self) -> Result<(), Failure> {
        let mut running: JoinSet<Delivered> = JoinSet::new();
        let mut in_hand: HashMap<JobKey, AbortHandle> = HashMap::new();
        loop {
            tokio::select! {
                event = self.jobs.next() => match event {
                    Some(Ok(JobEvent::Job(job))) => self.take(job, &mut running, &mut in_hand).await?,
                    Some(Ok(JobEvent::Withdrawn(key))) => {
                        if let Some(delivery) = in_hand.remove(&key) {
                            delivery.abort();
                        }
                        let event = json!({"event": "withdrawn", "key": key.to_string()});
                        self.output.event(&event, || format!("job {key}: withdrawn"))?;
                    }
                    Some(Err(error)) => return Err(error.into()),
                    None => return Ok(()),
                },
                Some(delivered) = running.join_next() => {
                    // What was withdrawn has been told of.
                    let Ok((key, result)) = delivered else { continue };
                    if in_hand.remove(&key).is_some() {
                        let (outcome, why) = result?;
                        self.finish(key, outcome, &why).await?;
                    }
                }
            }
        }
    }

    async fn take(
        &self,
        job: Job,
        running: &mut JoinSet<Delivered>,
        in_hand: &mut HashMap<JobKey, AbortHandle>,
    ) -> Result<(), Failure> {
        let mut event = body(&job);
        event["event"] = "job".into();
        self.output.event(&event, || {
            let cause = job.cause.name().unwrap_or_default();
            format!("job {} for {}: {cause} in {}", job.key, job.principal.as_str(), job.session)
        })?;
        let Some(webhook) = self.webhook.clone() else {
            return self.finish(job.key, JobOutcome::Delivered, "").await;
        };
        let delivery = Delivery { webhook, give_up: self.give_up, output: self.output };
        let key = job.key.clone();
        let handle = running.spawn(async move {
            let result = delivery.deliver(&job).await;
            (job.key, result)
        });
        in_hand.insert(key, handle);
        Ok(())
    }

    async fn finish(&self, key: JobKey, outcome: JobOutcome, why: &str) -> Result<(), Failure> {
        let event = json!({"event": outcome.as_str(), "key": key.to_string(), "why": why});
        self.output.event(&event, || match outcome {
            JobOutcome::Delivered => format!("job {key}: delivered"),
            JobOutcome::Failed => format!("job {key}: failed: {why}"),
        })?;
        self.jobs.done(key, outcome, why).await;
        Ok(())
    }
}
