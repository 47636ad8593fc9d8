#!/usr/bin/env bash
# Credentials of a federation: a certificate authority, the SuperLink's certificate, and one EC
# P-384 key pair for each SuperNode.
#
#   docker/make-credentials.sh [-o FOLDER] [-d DAYS] [-n NODE]… HOST…
#
# HOST  names and addresses by which SuperNodes and users reach the SuperLink; localhost, 127.0.0.1
#       and ::1 are always added, because the SuperLink's own processes connect there.
# -n    name of a SuperNode; makes NODE (private, for that machine alone) and NODE.pub (to register)
# -o    where to write (docker/credentials beside this script unless given)
# -d    days that the certificates last (825 unless given)
#
# Files that exist are kept, so that nodes can be added later; remove server.crt to have it made for
# other hosts. ca.key signs new server certificates: keep it off the SuperLink's machine.
set -euo pipefail
umask 077

usage() {
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

folder="$(cd "$(dirname "$0")" && pwd)/credentials"
days=825
nodes=()
while getopts "o:d:n:h" option; do
    case "$option" in
        o) folder="$OPTARG" ;;
        d) days="$OPTARG" ;;
        n) nodes+=("$OPTARG") ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || usage

for name in "$@" ${nodes[@]+"${nodes[@]}"}; do
    if ! [[ "$name" =~ ^[A-Za-z0-9:._*-]+$ ]] || [[ "$name" == -* ]]; then
        echo "'$name': expected a host name, an address or a node name without blanks" >&2
        exit 2
    fi
done
for node in ${nodes[@]+"${nodes[@]}"}; do
    case "$node" in
        *[:*]* | .* | ca.* | server.*)
            echo "-n '$node': expected a name of letters, digits, '-', '_' and '.', not ca.* or server.*" >&2
            exit 2
            ;;
    esac
done

mkdir -p "$folder"
cd "$folder"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
p384=(-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes)

if [ -e ca.crt ]; then
    echo "kept $folder/ca.crt"
else
    printf '%s\n' '[req]' 'distinguished_name=name' 'x509_extensions=ca' '[name]' '[ca]' \
        'basicConstraints=critical,CA:true,pathlen:0' 'keyUsage=critical,keyCertSign,cRLSign' \
        'subjectKeyIdentifier=hash' >"$scratch/ca.cnf"
    openssl req -x509 "${p384[@]}" -sha384 -days "$days" -config "$scratch/ca.cnf" \
        -subj "/CN=RankFit federation CA" -keyout ca.key -out ca.crt 2>"$scratch/log" ||
        { cat "$scratch/log" >&2; exit 1; }
    echo "made $folder/ca.crt"
fi

if [ -e server.crt ]; then
    for host in "$@"; do
        check=-checkhost
        if [[ "$host" =~ ^[0-9.]+$ || "$host" == *:* ]]; then check=-checkip; fi
        if openssl x509 -in server.crt -noout "$check" "$host" | grep -q "NOT match"; then
            echo "$folder/server.crt is not for '$host': remove it and server.key, and run this" \
                "again with every host" >&2
            exit 1
        fi
    done
    echo "kept $folder/server.crt"
else
    names="DNS:localhost,IP:127.0.0.1,IP:::1"
    for host in "$@"; do
        if [[ "$host" =~ ^[0-9.]+$ || "$host" == *:* ]]; then
            names+=",IP:$host"
        else
            names+=",DNS:$host"
        fi
    done
    printf '%s\n' "subjectAltName=$names" 'basicConstraints=critical,CA:false' \
        'keyUsage=critical,digitalSignature' 'extendedKeyUsage=serverAuth' \
        'subjectKeyIdentifier=hash' 'authorityKeyIdentifier=keyid' >"$scratch/server.cnf"
    printf '%s\n' '[req]' 'distinguished_name=name' '[name]' >"$scratch/request.cnf"
    {
        openssl req -new "${p384[@]}" -config "$scratch/request.cnf" -subj "/CN=RankFit SuperLink" \
            -keyout "$scratch/server.key" -out "$scratch/server.csr" &&
            openssl x509 -req -sha384 -days "$days" -in "$scratch/server.csr" -CA ca.crt \
                -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" \
                -extfile "$scratch/server.cnf" -out "$scratch/server.crt"
    } 2>"$scratch/log" || { cat "$scratch/log" >&2; exit 1; }
    mv "$scratch/server.key" "$scratch/server.crt" .
    echo "made $folder/server.crt for $names"
fi

for node in ${nodes[@]+"${nodes[@]}"}; do
    if [ -e "$node" ]; then
        echo "kept $folder/$node"
    else
        ssh-keygen -q -t ecdsa -b 384 -N "" -C "$node" -f "$node"
        echo "made $folder/$node and $node.pub"
    fi
done
chmod 644 ./*.crt
for public in ./*.pub; do [ ! -e "$public" ] || chmod 644 "$public"; done
