//! What a service's errors mean, and what to do about them. Services answer in XML with a code; of its text only code and
//! message are shown, for the rest may repeat what was signed.

use std::error::Error as StdError;

use object_store::Error as RemoteError;

use crate::error::{Error, Kind};

/// What went wrong, as far as the text of an error tells.
struct Failure {
    status: Option<u16>,
    code: Option<String>,
    message: String,
}

impl Failure {
    fn of(error: &RemoteError) -> Self {
        let text = error.to_string();
        let status = text.split_once("status code: ").and_then(|(_, rest)| rest.get(..3)?.parse().ok());
        let code = element(&text, "Code");
        let message = match (&code, element(&text, "Message")) {
            (Some(code), Some(message)) if !message.is_empty() => format!("{code}: {message}"),
            (Some(code), _) => code.clone(),
            (None, _) => match status {
                Some(status) => format!("the service answered with status {status}"),
                None => innermost(error),
            },
        };
        Self { status, code, message }
    }
}

/// The text of an XML element that has no other inside.
fn element(text: &str, name: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once('<')?.0.trim().to_owned())
}

/// The errors that led to this one, from the one that says most about the cause.
pub fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut parts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(source) = next {
        parts.push(source.to_string());
        next = source.source();
    }
    // Each layer says what the next one does, or nothing but that it failed.
    parts.pop().unwrap_or_default()
}

/// The error for something that could not be done to an object.
pub(super) fn explain(url: &str, verb: &str, key: &str, error: &RemoteError) -> Error {
    let Failure { status, code, message } = Failure::of(error);
    let code = code.as_deref().unwrap_or_default();
    let failed = |kind, hint: &str| Error::new(kind, format!("cannot {verb} {key} in {url}: {message}")).hint(hint);
    match (code, status) {
        ("NoSuchBucket", _) => Error::not_found(format!("there is no bucket for {url}: {message}"))
            .hint("make the bucket, or check its name, the endpoint and the region"),
        _ if matches!(error, RemoteError::NotFound { .. }) && verb == "read" => missing(url, key),
        ("RequestTimeTooSkewed" | "RequestExpired", _) => {
            failed(Kind::Io, "set this host's clock: the service refuses requests whose time is wrong")
        }
        ("InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken", _) => {
            failed(Kind::Io, "check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile")
        }
        ("QuotaExceeded" | "EntityTooLarge", _) | (_, Some(507)) => {
            failed(Kind::NoSpace, "free some space or raise the quota, and repeat; nothing was lost")
        }
        ("AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException", _)
        | (_, Some(301 | 307)) => failed(Kind::Io, "check the region: set AWS_REGION to that of the bucket"),
        (_, Some(401 | 403)) => failed(Kind::Io, "check the credentials and what they allow in that bucket"),
        (_, Some(501)) => failed(Kind::Io, "the service must refuse to overwrite an object when it is asked to"),
        (_, Some(408 | 429 | 500..)) => {
            failed(Kind::Unavailable, "the service is busy or broken; repeat when it has recovered")
        }
        (_, Some(_)) => failed(Kind::Io, "the service does not do what is asked of it; is it the right endpoint?"),
        (_, None) if matches!(error, RemoteError::NotImplemented { .. } | RemoteError::NotSupported { .. }) => {
            failed(Kind::Io, "the service must refuse to overwrite an object when it is asked to")
        }
        (_, None) if message.contains("InvalidContentType") => {
            failed(Kind::Io, "nobody speaks TLS there: does the endpoint begin with http:// and not https://?")
        }
        (_, None) if is_about_trust(&message) => failed(
            Kind::Io,
            "the service's certificate is not trusted: check the endpoint, or name its authority's in AWS_CA_BUNDLE",
        ),
        (_, None) if message.contains("region") => {
            failed(Kind::Io, "check the region: set AWS_REGION to that of the bucket")
        }
        (_, None) if message.contains("range") => failed(Kind::Io, "the object is not as long as was expected"),
        (_, None) => failed(Kind::Unavailable, "check the endpoint and the network, and whether the service runs"),
    }
}

/// Whether it is of no use to try again: the service is another, or not to be trusted.
pub fn is_about_trust(message: &str) -> bool {
    let message = message.to_lowercase();
    ["certificate", "tls", "handshake", "corrupt message", "unknownissuer"].iter().any(|word| message.contains(word))
}

pub(super) fn missing(url: &str, key: &str) -> Error {
    Error::not_found(format!("there is no object {key} in {url}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Error {
        explain("s3://b", "write", "k", &RemoteError::Generic { store: "S3", source: text.into() })
    }

    #[test]
    fn codes_become_advice_and_what_was_signed_is_not_shown() {
        let xml = "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code><Message>no</Message><StringToSign>secret stuff</StringToSign></Error>";
        let error = told(xml);
        assert_eq!(error.kind(), Kind::Io);
        assert!(
            error.to_string().ends_with("SignatureDoesNotMatch: no") && error.next_step().unwrap().contains("AWS_")
        );
        assert_eq!(told("status code: 404: <Code>NoSuchBucket</Code>").kind(), Kind::NotFound);
        assert_eq!(told("status code: 503: <Code>SlowDown</Code><Message></Message>").kind(), Kind::Unavailable);
        assert_eq!(told("invalid peer certificate: UnknownIssuer").kind(), Kind::Io);
        let plain = told("received corrupt message of type InvalidContentType");
        assert!(plain.kind() == Kind::Io && plain.next_step().unwrap().contains("http://"));
        assert_eq!(told("tcp connect error: Connection refused (os error 111)").kind(), Kind::Unavailable);
        assert!(told("status code: 403: <Code>RequestTimeTooSkewed</Code>").next_step().unwrap().contains("clock"));
        assert_eq!(told("status code: 403: <Code>QuotaExceeded</Code>").kind(), Kind::NoSpace);
    }
}
