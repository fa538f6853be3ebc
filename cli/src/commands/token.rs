//! `token`: make and read capability tokens.

use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};

use mainstay_protocol::session::{Grant, Grants, Operation, Operations};
use mainstay_protocol::wire::Subject;
use mainstay_server::auth::{self, Claims, SigningKey};
use serde_json::json;

use crate::args::{self, TokenAction};
use crate::data::{Data, write_secret};
use crate::failure::Failure;
use crate::output::Output;

pub(crate) fn run(args: args::Token, output: Output) -> Result<(), Failure> {
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
        TokenAction::Mint { subject, grant, ttl, device, key } => {
            let path = match key {
                Some(path) => path,
                None => Data::new(None)?.signing_key_file(),
            };
            let text = std::fs::read_to_string(&path).map_err(|error| Failure::io(path.display(), &error))?;
            let key = SigningKey::from_paserk(&text)
                .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let issued = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
            let claims = Claims {
                subject: Subject::new(&subject).map_err(|error| Failure::usage(error.detail))?,
                device: match device {
                    Some(device) => {
                        Some(device.parse().map_err(|_| Failure::usage("--device is not 32 hexadecimal digits"))?)
                    }
                    None => None,
                },
                grants: Grants(grant.iter().map(|text| parse_grant(text)).collect::<Result<_, _>>()?),
                issued,
                expires: issued + i64::from(ttl),
            };
            let token = key.mint(&claims).map_err(Failure::usage)?;
            output.event(&json!({"event": "token", "token": token}), || token.clone())
        }
        TokenAction::Inspect { token } => {
            let text = if token == "-" {
                let mut text = String::new();
                let read = std::io::stdin().read_to_string(&mut text);
                read.map_err(|error| Failure::io("standard input", &error))?;
                text
            } else {
                token
            };
            let (claims, kid) = auth::read(text.trim().as_bytes()).map_err(|error| Failure::usage(error.detail))?;
            inspect(&claims, &kid, output)
        }
    }
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
                Failure::usage(format!("--grant {text}: {name:?} is not read, append, create, manage or all"))
            })
        };
        operations.split(',').map(parse).collect::<Result<Operations, _>>()?
    };
    Ok(Grant { prefix: prefix.to_owned(), operations })
}

fn inspect(claims: &Claims, kid: &str, output: Output) -> Result<(), Failure> {
    let time = |seconds: i64| crate::output::time(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
    let words = |grant: &Grant| -> Vec<&str> {
        Operation::ALL.into_iter().filter(|op| grant.operations.contains(*op)).map(Operation::as_str).collect()
    };
    let grants: Vec<_> =
        claims.grants.0.iter().map(|grant| json!({"prefix": grant.prefix, "ops": words(grant)})).collect();
    let event = json!({
        "event": "token",
        "subject": claims.subject.as_str(),
        "device": claims.device.map(|device| device.to_string()),
        "issued": time(claims.issued),
        "expires": time(claims.expires),
        "key": kid,
        "grants": grants,
        "verified": false,
    });
    output.event(&event, || {
        let mut lines = vec![
            format!("subject  {}", claims.subject),
            format!("issued   {}", time(claims.issued)),
            format!("expires  {}", time(claims.expires)),
            format!("key      {kid} (the signature was not verified)"),
        ];
        lines.extend(claims.device.map(|device| format!("device   {device}")));
        for grant in &claims.grants.0 {
            let prefix = if grant.prefix.is_empty() { "every session" } else { &grant.prefix };
            lines.push(format!("grant    {prefix}: {}", words(grant).join(", ")));
        }
        lines.join("\n")
    })
}
