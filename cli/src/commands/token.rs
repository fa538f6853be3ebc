//! `token`: make, read and revoke capability tokens.

use core::time::Duration;
use std::io::Read;
use std::path::Path;

use mainstay_client::Config;
use mainstay_protocol::session::{Grant, Grants, Instance, Operation, Operations};
use mainstay_protocol::wire::Subject;
use mainstay_server::auth::{Claims, Revocation, SigningKey, Verified, VerifyingKey};
use mainstay_transport::quic::{Pin, read_certificates};
use serde_json::json;

use crate::args::{self, TokenAction};
use crate::data::{Data, now, with_client, write_secret};
use crate::failure::Failure;
use crate::output::{Output, plain};
use crate::serve::questions::{self, Question};

pub(crate) async fn run(args: args::Token, output: Output) -> Result<(), Failure> {
    match args.action {
        TokenAction::Keygen { out } => {
            if out.exists() {
                return Err(Failure::usage(format!("{} exists; it is not overwritten", out.display())));
            }
            let key = SigningKey::generate().map_err(|error| Failure::failed("INTERNAL", error))?;
            write_secret(&out, (key.to_paserk() + "\n").as_bytes())
                .map_err(|error| Failure::io(out.display(), &error))?;
            let public = key.verifying_key();
            let event = json!({"event": "key", "id": public.id(), "public": public.to_paserk()});
            output.event(&event, || public.to_paserk())
        }
        TokenAction::Mint { subject, grant, ttl, device, certificate, id, key } => {
            let path = match key {
                Some(path) => path,
                None => Data::new(None)?.signing_key_file(),
            };
            let text = std::fs::read_to_string(&path).map_err(|error| Failure::io(path.display(), &error))?;
            let key = SigningKey::from_paserk(&text)
                .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
            let issued = now();
            let subject = Subject::new(&subject).map_err(|error| Failure::usage(error.detail))?;
            let claims = Claims {
                device: device.as_deref().map(parse_device).transpose()?,
                certificate: certificate.as_deref().map(pin_of).transpose()?,
                id,
                ..Claims::new(subject, parse_grants(&grant)?, issued, issued + i64::from(ttl))
            };
            let token = key.mint(&claims).map_err(Failure::usage)?;
            output.event(&json!({"event": "token", "token": token}), || token.clone())
        }
        TokenAction::Delegate { name, grant, ttl, device, out, connect } => {
            let grants = parse_grants(&grant)?;
            let device = device.as_deref().map(parse_device).transpose()?;
            let mut config = Config::default();
            // Somebody waits for one answer, not for a server to come back.
            config.give_up_after = Some(Duration::from_secs(5));
            let connect = connect.connect.as_deref();
            let made = with_client(connect, config, output, async |client| {
                Ok(client.mint(&name, grants.clone(), u64::from(ttl), device).await?)
            });
            let made = made.await?;
            let expires = crate::output::time(made.expires.saturating_mul(1000));
            let Some(out) = out else {
                let event = json!({"event": "token", "token": made.token, "expires": expires});
                return output.event(&event, || made.token.clone());
            };
            let mut file = crate::data::connect_file(connect)?;
            file.token = made.token;
            let text =
                serde_json::to_vec_pretty(&file).map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
            write_secret(&out, &text).map_err(|error| Failure::io(out.display(), &error))?;
            let event = json!({"event": "token", "connect": out.display().to_string(), "expires": expires});
            output.event(&event, || format!("{} is good until {expires}", out.display()))
        }
        TokenAction::Revoke { token, id, subject, key, namespace, data } => {
            let revocation = match (token, id, subject, key) {
                (Some(token), ..) => {
                    let token = given(token)?;
                    Revocation::Token { id: read(&token)?.id }
                }
                (_, Some(id), ..) => Revocation::Token { id },
                (_, _, Some(subject), _) => Revocation::Subject { subject, until: now() },
                // The key itself stands for its id.
                (.., Some(id)) => Revocation::Key { id: VerifyingKey::from_paserk(&id).map_or(id, |key| key.id()) },
                // The arguments have one of them.
                _ => return Err(Failure::usage("nothing is named that is to be revoked")),
            };
            revoke(data.as_deref(), namespace, revocation, output)
        }
        TokenAction::Inspect { token } => inspect(&read(&given(token)?)?, output),
    }
}

/// A token that was given, or that comes on standard input.
fn given(token: String) -> Result<String, Failure> {
    if token != "-" {
        return Ok(token);
    }
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    read.map_err(|error| Failure::io("standard input", &error))?;
    Ok(text)
}

/// What a token says.
fn read(token: &str) -> Result<Verified, Failure> {
    Verified::unchecked(token.trim().as_bytes()).map_err(|error| Failure::usage(error.detail))
}

/// Has the server that runs believe something no more; where none does, the next one.
fn revoke(dir: Option<&Path>, namespace: String, revocation: Revocation, output: Output) -> Result<(), Failure> {
    let data = Data::new(dir)?;
    // Of a token what it says of itself, which nobody has verified.
    let what = plain(&match &revocation {
        Revocation::Token { id } => format!("the token {id}"),
        Revocation::Key { id } => format!("the key {id}"),
        Revocation::Subject { subject, .. } => format!("the tokens of {subject}"),
    });
    let question = Question::Revoke { namespace: namespace.clone(), revocation: revocation.clone() };
    if let Some(answer) = questions::ask(&data.socket(), question)? {
        let new = answer["new"].as_bool().unwrap_or(true);
        let event = json!({"event": "revoked", "new": new, "in_force": true, "what": what});
        return output.event(&event, || match new {
            true => format!("revoked: {what}"),
            false => format!("it was revoked before: {what}"),
        });
    }
    let data = data.namespace(&namespace)?;
    data.must_exist()?;
    let mut revocations = data.revocations()?;
    let new = revocations.add(revocation, now()).map_err(|error| Failure::failed("REFUSED", error))?;
    let path = data.revocations_file();
    data.write_revocations(&revocations).map_err(|error| Failure::io(path.display(), &error))?;
    let event = json!({"event": "revoked", "new": new, "in_force": false, "what": what});
    output
        .event(&event, || format!("no server serves {}; revoked from the next start on: {what}", data.dir().display()))
}

fn parse_grants(grants: &[String]) -> Result<Grants, Failure> {
    Ok(Grants(grants.iter().map(|text| parse_grant(text)).collect::<Result<_, _>>()?))
}

fn parse_device(text: &str) -> Result<Instance, Failure> {
    text.parse().map_err(|_| Failure::usage("--device is not 32 hexadecimal digits"))
}

/// The pin of the certificate in a file.
fn pin_of(path: &Path) -> Result<[u8; 32], Failure> {
    let chain = read_certificates(path).map_err(Failure::usage)?;
    let leaf = chain.first().ok_or_else(|| Failure::usage(format!("{}: no certificate in it", path.display())))?;
    Pin::of(leaf).map(|pin| pin.0).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
}

/// Reads PREFIX=OPERATIONS. The operations never hold `=`, the prefix may.
fn parse_grant(text: &str) -> Result<Grant, Failure> {
    let (prefix, operations) =
        text.rsplit_once('=').ok_or_else(|| Failure::usage(format!("--grant {text}: not PREFIX=OPERATIONS")))?;
    let operations = if operations == "all" {
        Operations::all()
    } else {
        let parse = |name| {
            Operation::from_name(name).ok_or_else(|| {
                let known: Vec<&str> = Operation::ALL.iter().map(|operation| operation.as_str()).collect();
                Failure::usage(format!("--grant {text}: {name:?} is not {} or all", known.join(", ")))
            })
        };
        operations.split(',').map(parse).collect::<Result<Operations, _>>()?
    };
    Ok(Grant { prefix: prefix.to_owned(), operations })
}

fn inspect(read: &Verified, output: Output) -> Result<(), Failure> {
    let Verified { claims, id, key: kid } = read;
    let time = |seconds: i64| crate::output::time(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
    let words = |grant: &Grant| -> Vec<&str> { grant.operations.iter().map(Operation::as_str).collect() };
    let grants: Vec<_> =
        claims.grants.0.iter().map(|grant| json!({"prefix": grant.prefix, "ops": words(grant)})).collect();
    let event = json!({
        "event": "token",
        "subject": claims.subject.as_str(),
        "device": claims.device.map(|device| device.to_string()),
        "issued": time(claims.issued),
        "expires": time(claims.expires),
        "key": kid,
        "id": id,
        "made_from": claims.ancestors,
        "certificate": claims.certificate.map(|pin| Pin(pin).to_hex()),
        "grants": grants,
        "verified": false,
    });
    output.event(&event, || {
        let mut lines = vec![
            format!("subject  {}", claims.subject),
            format!("issued   {}", time(claims.issued)),
            format!("expires  {}", time(claims.expires)),
            format!("key      {} (the signature was not verified)", plain(kid)),
            format!("id       {}", plain(id)),
        ];
        lines.extend(
            claims.certificate.map(|pin| format!("bound to the certificate with the pin {}", Pin(pin).to_hex())),
        );
        lines.extend(claims.ancestors.iter().map(|id| format!("made from {}", plain(id))));
        lines.extend(claims.device.map(|device| format!("device   {device}")));
        for grant in &claims.grants.0 {
            let prefix = if grant.prefix.is_empty() { "every session".to_owned() } else { plain(&grant.prefix) };
            lines.push(format!("grant    {prefix}: {}", words(grant).join(", ")));
        }
        lines.join("\n")
    })
}
