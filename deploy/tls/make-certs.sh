#!/bin/sh
# Makes an authority, a broker's certificate and a client's, as PEM files: to try TLS out, not for production.
#   sh make-certs.sh FOLDER [NAME …]     NAME: further DNS names of the broker, besides localhost and kafka
# Kafka takes broker.pem as ssl.keystore.location and ca.crt as ssl.truststore.location, both of type PEM.
# VALID_DAYS: how long they are valid.
set -eu
folder=${1:?the folder to write to}
shift
names="DNS:localhost,DNS:kafka,IP:127.0.0.1"
for name in "$@"; do names="$names,DNS:$name"; done
umask 077
mkdir -p "$folder"
cd "$folder"
openssl req -x509 -newkey rsa:2048 -nodes -days "${VALID_DAYS:-30}" -subj "/CN=Millstream try-out authority" -keyout ca.key -out ca.crt 2> openssl.log
for who in broker client; do
  openssl req -newkey rsa:2048 -nodes -subj "/CN=$who" -keyout $who.key -out $who.csr 2>> openssl.log
  printf 'subjectAltName=%s\n' "$names" > $who.ext
  openssl x509 -req -in $who.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days "${VALID_DAYS:-30}" -extfile $who.ext -out $who.crt 2>> openssl.log
  rm $who.csr $who.ext
done
cat broker.key broker.crt ca.crt > broker.pem
rm openssl.log
echo "wrote ca.crt, broker.pem, client.crt and client.key to $folder"
