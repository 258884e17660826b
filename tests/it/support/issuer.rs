//! An identity provider, as a CI system has one: it signs what it says of its jobs.

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// The name of its key.
const KEY: &str = "one";

pub(crate) struct Issuer {
    key: EcdsaKeyPair,
}

impl Issuer {
    pub(crate) fn new() -> Self {
        Self { key: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap() }
    }

    /// Its public key, as PEM.
    pub(crate) fn pem(&self) -> String {
        let der: PublicKeyX509Der<'_> = self.key.public_key().as_der().unwrap();
        format!(
            "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
            BASE64_STANDARD.encode(der.as_ref())
        )
    }

    /// A JWT of a job of a repository, good for so many seconds from now on.
    pub(crate) fn token(&self, repository: &str, seconds: i64) -> String {
        self.sign(&claims(repository, seconds))
    }

    /// The same, for others than those who are to take it.
    pub(crate) fn token_for(&self, audience: &Value, repository: &str) -> String {
        let mut claims = claims(repository, 600);
        claims["aud"] = audience.clone();
        self.sign(&claims)
    }

    /// The same, which names an algorithm of whoever made it up, with a signature or without.
    pub(crate) fn unsigned(&self, repository: &str, algorithm: &str, is_signed: bool) -> String {
        let claims = claims(repository, 600);
        let whole = self.sign_as(&json!({ "alg": algorithm, "typ": "JWT", "kid": KEY }), &claims);
        if is_signed { whole } else { format!("{}.", whole.rsplit_once('.').unwrap().0) }
    }

    /// The same, signed with what everybody knows: its public key, as if that were a shared secret.
    pub(crate) fn signed_with_the_public_key(&self, repository: &str) -> String {
        let signed = begin(&json!({ "alg": "HS256", "typ": "JWT", "kid": KEY }), &claims(repository, 600));
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.pem().as_bytes());
        let signature = hmac::sign(&key, signed.as_bytes());
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// Its public key, as a set of JSON Web Keys has it.
    pub(crate) fn jwk(&self) -> Value {
        // A point, uncompressed: 4, and both of its coordinates.
        let (x, y) = self.key.public_key().as_ref()[1..].split_at(32);
        let text = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": KEY, "x": text(x), "y": text(y) })
    }

    /// A JWT that makes these claims.
    pub(crate) fn sign(&self, claims: &Value) -> String {
        self.sign_as(&json!({ "alg": "ES256", "typ": "JWT", "kid": KEY }), claims)
    }

    fn sign_as(&self, header: &Value, claims: &Value) -> String {
        let signed = begin(header, claims);
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }
}

/// What it says of a job of a repository, for so many seconds from now on.
fn claims(repository: &str, seconds: i64) -> Value {
    let now = chrono::Utc::now().timestamp();
    json!({
        "iss": "https://ci.example.com", "aud": "nomad-build", "sub": format!("repo:{repository}"),
        "repository": repository, "iat": now - 60, "nbf": now - 60, "exp": now + seconds,
        // So that no two are alike.
        "jti": uuid::Uuid::new_v4().to_string(),
    })
}

/// What of a JWT is signed.
fn begin(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}
