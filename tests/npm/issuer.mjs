// An OpenID provider whose keys rotate while it runs: `issuer.mjs PORT`; each line on standard input
// makes it publish a new key and sign with that alone. It prints a line whenever it is ready.

import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { generateKeyPairSync } from "node:crypto";
import Provider from "oidc-provider";

const port = Number(process.argv[2]);
const issuer = `http://127.0.0.1:${port}`;
let generation = 0;

function provider() {
  generation += 1;
  const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const key = { ...privateKey.export({ format: "jwk" }), kid: `key-${generation}`, use: "sig", alg: "ES256" };
  const client = (id) => ({
    client_id: id,
    client_secret: "secret",
    grant_types: ["client_credentials"],
    redirect_uris: [],
    response_types: [],
    id_token_signed_response_alg: "ES256",
  });
  return new Provider(issuer, {
    clients: [client("alice"), client("bob")],
    jwks: { keys: [key] },
    ttl: { ClientCredentials: 600 },
    extraTokenClaims: () => ({ org: { tenant: "acme", roles: ["writer"] } }),
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: (_, resource) => ({
          scope: "call",
          audience: resource,
          accessTokenFormat: "jwt",
          jwt: { sign: { alg: "ES256" } },
        }),
      },
    },
  }).callback();
}

let serve = provider();
createServer((request, response) => serve(request, response)).listen(port, "127.0.0.1", () => {
  console.log("ready");
  createInterface({ input: process.stdin }).on("line", () => {
    serve = provider();
    console.log("ready");
  });
});
